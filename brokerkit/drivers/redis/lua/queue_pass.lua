-- A session that was woken does not come: let another one look.
-- flags: allow-oom
-- uses: common queue_base
-- ARGV: 1 session
return run(function()
  redis.call('ZREM', E .. ':w', ARGV[1])
  wake(E, 1)
  return 1
end)
