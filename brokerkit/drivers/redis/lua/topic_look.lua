-- Tell how far a group is.
-- flags: allow-oom
-- uses: common topic_base topic_resolve
-- KEYS: 1 topic
-- ARGV: 1 group, 2 '1' for the oldest records too, 3 kind of start, then what belongs to it, for a group that does not exist
-- Returns the server's time in ms, then for each partition: end, first offset, position, high mark, frame of the oldest record or ''.
local topic, problem = topic_at(KEYS[1], '')
if not topic then return redis.error_reply(problem) end
local G = KEYS[1] .. ':g:' .. ARGV[1]
local positions, marks = fetch(G, fields('c', topic.partitions)), fetch(G, fields('h', topic.partitions))
if redis.call('EXISTS', G) == 0 then
  local at = {}
  for i = 4, #ARGV do at[#at + 1] = ARGV[i] end
  positions = resolve(topic, ARGV[3], at) or {}
end
local reply = {now}
for p = 0, topic.partitions - 1 do
  local first, oldest = topic.next[p + 1], ''
  local position = positions[p + 1] or '0-0 '
  if ARGV[2] == '1' then
    first = offset_of(first_from(topic, p, '-'))
    local id = string.match(position, '^%S+')
    local base = offset_of(id)
    local from = id
    while from do
      local entries = redis.call('XRANGE', KEYS[1] .. ':' .. p, from, '+', 'COUNT', 20)
      from = nil
      for _, entry in ipairs(entries) do
        local frame, ours = frame_of(entry)
        if ours and offset_of(entry[1]) >= base then
          oldest = frame
          break
        end
      end
      if oldest == '' and #entries > 0 then from = '(' .. entries[#entries][1] end
    end
  end
  reply[#reply + 1] = topic.next[p + 1]
  reply[#reply + 1] = first
  reply[#reply + 1] = position
  reply[#reply + 1] = marks[p + 1] or ''
  reply[#reply + 1] = oldest
end
return reply
