-- What nearly every take is, without anything defined first: plain messages are there, of the lowest priority alone, nobody else
-- waits, nothing is due; or there is nothing at all.  Whatever else there may be is done by what follows this file.
local quick, quickly = pcall(function()
  local E, name = KEYS[1], ARGV[1]
  local found = redis.call('HMGET', E, 'kind', 'priorities', 'lease')
  if found[1] == 'q' and ARGV[5] == '0' then
    local time = redis.call('TIME')
    local ms = time[1] * 1000 + math.floor(time[2] / 1000)
    local lease = tonumber(found[3] or 60) * 1000
    local deadline = tonumber(redis.call('ZSCORE', E .. ':n', name) or 0)
    local beyond = {E .. ':x'}
    for p = 1, tonumber(found[2] or 1) - 1 do beyond[p + 1] = E .. ':r' .. p end
    local first = redis.call('ZRANGE', E .. ':n', 0, 0, 'WITHSCORES')
    local due = redis.call('ZRANGE', E .. ':d', 0, 0, 'WITHSCORES')
    if deadline > ms and deadline <= ms + lease
      and redis.call('EXISTS', unpack(beyond)) == 0
      and tonumber(first[2]) > ms
      and (not due[2] or tonumber(due[2]) > ms)
    then
      local listed, others = ARGV[4] == '1', redis.call('ZCARD', E .. ':w')
      if listed then others = others - 1 end
      local room, line = tonumber(ARGV[2]), E .. ':r0'
      local taken = others > 0 and {} or redis.call('LRANGE', line, 0, math.min(room, 16) - 1)
      if #taken == 0 and (others <= 0 or redis.call('EXISTS', line) == 0) then
        local known = tonumber(ARGV[6])
        if (not known or redis.call('HLEN', E .. ':h:' .. name) == known)
          and #redis.call('ZRANGE', E .. ':n', '+inf', string.format('%.0f', ms + lease + 1000), 'BYSCORE', 'REV', 'LIMIT', 0, 1) == 0
        then
          if deadline - ms < lease * 0.9 then
            deadline = ms + lease
            redis.call('ZADD', E .. ':n', string.format('%.0f', deadline), name)
          end
          local gifts = tonumber(ARGV[3])
          if gifts > 0 then redis.call('ZADD', E .. ':w', string.format('%.17g', ms + math.min(gifts - 1, 4095) / 4096), name) end
          local nearest = due[2] and tonumber(due[2]) - ms or -1
          if first[1] ~= name and (nearest < 0 or tonumber(first[2]) - ms < nearest) then nearest = tonumber(first[2]) - ms end
          return {deadline - ms, 0, 0, nearest, taken}
        end
      end
      local size = 0
      for i = 1, #taken do size = size + #taken[i] end
      if #taken == 16 and room > 16 and size <= 65536 then
        -- Small ones: as many more as make a reply of about 1 MiB, if they are alike.
        local more = redis.call('LRANGE', line, 16, 15 + math.min(room - 16, math.floor(1048576 * 16 / size)))
        for i = 1, #more do
          size = size + #more[i]
          taken[16 + i] = more[i]
        end
      end
      local sub, byte = string.sub, string.byte
      local plain, pairs_ = #taken > 0 and (size <= 1048576 or #taken == 1), {}
      for i = 1, plain and #taken or 0 do
        local element = taken[i]
        if byte(element, 15) ~= 177 then plain = false break end
        local until_ = sub(element, 9, 14)
        if until_ ~= '\0\0\0\0\0\0' and struct.unpack('>I6', until_) <= ms then plain = false break end
        pairs_[2 * i - 1] = sub(element, 1, 6)
        pairs_[2 * i] = element
      end
      if plain then
        -- Written first, removed last: what is refused on the way loses nothing.
        local held = E .. ':h:' .. name
        for first = 1, #pairs_, 500 do redis.call('HSET', held, unpack(pairs_, first, math.min(first + 499, #pairs_))) end
        redis.call('LTRIM', line, #taken, -1)
        if deadline - ms < lease * 0.9 then
          deadline = ms + lease
          redis.call('ZADD', E .. ':n', string.format('%.0f', deadline), name)
        end
        if listed then redis.call('ZREM', E .. ':w', name) end
        return {deadline - ms, 0, 0, 0, taken}
      end
    end
  end
end)
if quick and quickly then return quickly end
