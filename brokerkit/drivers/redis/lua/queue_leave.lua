-- Hand back what sessions held, uncounted, and forget them.
-- flags: allow-oom
-- uses: common queue_base
-- ARGV: sessions
-- Returns 1 if there is more to hand back: call again.
return run(function()
  local budget, more = BATCH, 0
  for _, name in ipairs(ARGV) do
    if redis.call('ZSCORE', E .. ':n', name) then
      if budget <= 0 then
        -- From now on it is gone, whatever happens before the next call.
        redis.call('ZADD', E .. ':n', 'XX', LEAVING, name)
        more = 1
      else
        local count, all = undo(name, false, budget)
        budget = budget - count
        if not all then more = 1 end
      end
    end
  end
  wake(E, math.max(1, BATCH - budget))
  return more
end)
