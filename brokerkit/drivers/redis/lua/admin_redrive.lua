-- Move dead letters to a queue: each is stored there and gone here, at once; once, however often and late it is sent.
-- flags: allow-oom
-- uses: common store
-- KEYS: 1 the dead letters, 2 the answer to this very call, 3 the queue
-- ARGV: 1 settings to create a derived queue with or '', then of each letter its id and what is stored of it
-- Returns for each '1' if it was moved, '0' if it was gone, as one text.
local answer = redis.call('GET', KEYS[2])
if answer then return answer end
local queue, problem = open(KEYS[3], 'q', ARGV[1])
if not queue then return redis.error_reply(problem) end
local letters, results, moved = KEYS[1] .. ':l', {}, {}
for i = 2, #ARGV, 2 do
  if not moved[ARGV[i]] and #redis.call('XRANGE', letters, ARGV[i], ARGV[i]) == 1 then
    push(queue, ARGV[i + 1])
    moved[ARGV[i]] = true
    results[#results + 1] = '1'
  else
    results[#results + 1] = '0'
  end
end
finish()
for id in pairs(moved) do redis.call('XDEL', letters, id) end  -- last: what was refused before has lost nothing
answer = table.concat(results)
redis.call('SET', KEYS[2], answer, 'PX', 3600000)
return answer
