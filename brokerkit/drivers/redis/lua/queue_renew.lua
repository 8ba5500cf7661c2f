-- Let sessions own what they hold for another lease.
-- flags: allow-oom
-- uses: common queue_base
-- ARGV: sessions
-- Returns for each how many ms that is, 0 if it is gone.
return run(function()
  local owned = {}
  for i, name in ipairs(ARGV) do owned[i] = deadline_of(name) and renew(name) or 0 end
  return owned
end)
