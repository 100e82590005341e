"""What Redis does for us in one step, in Lua.

Each group of a stream, and each list, has siblings: a sorted set of its members and when they
gave a sign of life last (``alive``, in ms of the server's clock), a sorted set of what waits
for its next delivery and when that is due (``later``), and a hash of messages whose last attempt
began (``begun``). What waits in a stream belongs to the consumer ``~later`` meanwhile, so that
nobody's end concerns it; what waits of a list is in the set itself. Elements of a list that were
delivered before are wrapped: a mark, the number of deliveries, an id, the element.

A process whose last sign of life is too old counts as dead, and another one takes over what it
had taken. A consumer that never gave one is not ours: its entries are taken over by their age.
"""

from __future__ import annotations

import struct

from .wire import Script

#: The consumer that owns the entries which wait for their next delivery.
LATER = "~later"
#: How a wrapped element of a list begins; its length with the mark; then comes the element.
MARK = b"\x00ms1"
_WRAPPED = struct.Struct(">I8s")

_NOW = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""

#: KEYS: stream, alive, later. ARGV: group, me, ms until a silent member is dead, how many due
#: entries to take, how many of dead members, ms of foreign ones.
#: Gives the entries {id, fields, count}, whether there are more, ms until the next is due (-1
#: for none), how many entries are ours, the last id that the group got, and where members other
#: than this one hold entries, the first that is pending.
STREAM_TICK = Script(
    _NOW
    + """
local stream, alive, later = KEYS[1], KEYS[2], KEYS[3]
local group, me, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local room, dead_room, foreign = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local last = ''
for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local g = {}
  for i = 1, #info, 2 do g[info[i]] = info[i + 1] end
  if g['name'] == group then last = g['last-delivered-id'] end
end
if last == '' then return redis.error_reply('NOGROUP no group ' .. group) end
redis.call('ZADD', alive, now, me)
local out, more = {}, 0
local function take(id)
  local p = redis.call('XPENDING', stream, group, id, id, 1)
  if #p == 0 then return end
  local got = redis.call('XCLAIM', stream, group, me, 0, id)
  if #got > 0 and got[1] and got[1][2] then
    out[#out + 1] = {got[1][1], got[1][2], p[1][4] + 1}
  elseif #got > 0 then
    redis.call('XACK', stream, group, id)
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', later, '-inf', now, 'LIMIT', 0, room)) do
  redis.call('ZREM', later, id)
  take(id)
end
room = room - #out
for _, name in ipairs(redis.call('ZRANGEBYSCORE', alive, '-inf', now - ttl)) do
  local p = redis.call('XPENDING', stream, group, '-', '+', dead_room + 1, name)
  for i, entry in ipairs(p) do
    if dead_room > 0 then take(entry[1]); dead_room = dead_room - 1 else more = 1; break end
  end
  if #p == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, name)
    redis.call('ZREM', alive, name)
  end
end
local there, floor = 0, ''
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local c = {}
  for i = 1, #info, 2 do c[info[i]] = info[i + 1] end
  local holds = c['pending'] > 0
  if holds and c['name'] ~= me and c['name'] ~= '~later' then
    floor = redis.call('XPENDING', stream, group)[2] or ''
  end
  if c['name'] == me then
    there = c['pending']
  elseif holds and dead_room > 0 and not redis.call('ZSCORE', alive, c['name']) then
    local p = redis.call('XPENDING', stream, group, 'IDLE', foreign, '-', '+', 100, c['name'])
    for _, entry in ipairs(p) do
      local waits = c['name'] == '~later' and redis.call('ZSCORE', later, entry[1])
      if dead_room > 0 and not waits then
        take(entry[1])
        dead_room = dead_room - 1
      end
    end
  end
end
local next = redis.call('ZRANGE', later, 0, 0, 'WITHSCORES')
local due = -1
if #next > 0 then due = math.max(tonumber(next[2]) - now, 0) end
return {out, more, due, there, last, floor}
"""
)

#: KEYS: stream, later. ARGV: group, me, then id, ms until the next delivery and whether the
#: present one did not begin, for each entry.
STREAM_NACK = Script(
    _NOW
    + """
local stream, later, group, me = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local done = 0
for i = 3, #ARGV, 3 do
  local id, count = ARGV[i], 0
  local p = redis.call('XPENDING', stream, group, id, id, 1)
  if #p > 0 and p[1][2] == me then
    count = p[1][4] - tonumber(ARGV[i + 2])
    redis.call('XCLAIM', stream, group, '~later', 0, id, 'RETRYCOUNT', count, 'JUSTID')
    redis.call('ZADD', later, now + tonumber(ARGV[i + 1]), id)
    done = done + 1
  end
end
return done
"""
)

#: KEYS: stream. ARGV: group, me, ids. Gives what of it belongs to us, without delivering it anew.
STREAM_MINE = Script(
    """
local stream, group, me = KEYS[1], ARGV[1], ARGV[2]
local out = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local p = redis.call('XPENDING', stream, group, id, id, 1)
  if #p > 0 and p[1][2] == me then
    local e = redis.call('XRANGE', stream, id, id)
    if #e > 0 then
      out[#out + 1] = {id, e[1][2], p[1][4]}
    else
      redis.call('XACK', stream, group, id)
    end
  end
end
return out
"""
)

#: KEYS: stream, alive. ARGV: group, me.
STREAM_LEAVE = Script(
    """
local p = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if #p == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  redis.call('ZREM', KEYS[2], ARGV[2])
else
  redis.call('ZADD', KEYS[2], 0, ARGV[2])
end
return 1
"""
)

_WRAP = """
local MARK = '\\0ms1'
local function wrap(element, more, id)
  if string.sub(element, 1, 4) == MARK then
    local n = struct.unpack('>I4', element, 5)
    return MARK .. struct.pack('>I4', n + more) .. string.sub(element, 9)
  end
  return MARK .. struct.pack('>I4', 1 + more) .. id .. element
end
"""

#: KEYS: list, in-flight list. ARGV: how many. Gives the elements.
LIST_TAKE = Script(
    """
local out = {}
for i = 1, tonumber(ARGV[1]) do
  local element = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
  if not element then break end
  out[i] = element
end
return out
"""
)

#: KEYS: in-flight list. ARGV: elements. Gives how many were there. As a rule they are the first
#: ones in their order, and go as one.
LIST_ACK = Script(
    """
local head = redis.call('LRANGE', KEYS[1], 0, #ARGV - 1)
local same = #head == #ARGV
for i = 1, #head do
  if head[i] ~= ARGV[i] then same = false; break end
end
if same then
  redis.call('LTRIM', KEYS[1], #ARGV, -1)
  return #ARGV
end
local done = 0
for i = 1, #ARGV do done = done + redis.call('LREM', KEYS[1], 1, ARGV[i]) end
return done
"""
)

#: KEYS: list, in-flight list, alive, later. ARGV: me, ms until a silent member is dead, how many
#: due elements to take, how many of dead members, how the name of an in-flight list begins, eight
#: random bytes. Gives the elements, whether there are more, ms until the next is due, how many
#: elements are ours.
LIST_TICK = Script(
    _NOW
    + _WRAP
    + """
local mine, alive, later = KEYS[2], KEYS[3], KEYS[4]
local me, ttl, room, dead_room = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZADD', alive, now, me)
local out, more = {}, 0
local function take(element, uid)
  local again = wrap(element, 1, uid)
  redis.call('RPUSH', mine, again)
  out[#out + 1] = again
end
for _, element in ipairs(redis.call('ZRANGEBYSCORE', later, '-inf', now, 'LIMIT', 0, room)) do
  redis.call('ZREM', later, element)
  take(element, ARGV[6])
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', alive, '-inf', now - ttl)) do
  local theirs = ARGV[5] .. name
  while dead_room > 0 do
    local element = redis.call('LPOP', theirs)
    if not element then redis.call('ZREM', alive, name); break end
    take(element, string.sub(ARGV[6], 1, 6) .. struct.pack('>I2', #out % 65536))
    dead_room = dead_room - 1
  end
  if redis.call('EXISTS', theirs) == 1 then more = 1 end
end
local next = redis.call('ZRANGE', later, 0, 0, 'WITHSCORES')
local due = -1
if #next > 0 then due = math.max(tonumber(next[2]) - now, 0) end
return {out, more, due, redis.call('LLEN', mine)}
"""
)

#: KEYS: list, in-flight list, later. ARGV: element, ms until the next delivery, whether the
#: present one did not begin, eight random bytes; for each element.
LIST_NACK = Script(
    _NOW
    + _WRAP
    + """
local list, mine, later = KEYS[1], KEYS[2], KEYS[3]
local done = 0
for i = 1, #ARGV, 4 do
  local element, fresh = ARGV[i], tonumber(ARGV[i + 2])
  if redis.call('LREM', mine, 1, element) == 1 then
    if fresh == 1 and string.sub(element, 1, 4) ~= MARK then
      redis.call('LPUSH', list, element)
    else
      redis.call('ZADD', later, now + tonumber(ARGV[i + 1]), wrap(element, -fresh, ARGV[i + 3]))
    end
    done = done + 1
  end
end
return done
"""
)

#: KEYS: in-flight list, alive. ARGV: me.
LIST_LEAVE = Script(
    """
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('ZREM', KEYS[2], ARGV[1])
else
  redis.call('ZADD', KEYS[2], 0, ARGV[1])
end
return 1
"""
)


def unwrap(element: bytes) -> tuple[bytes, int, bytes]:
    """The value in an element of an in-flight list, its number of deliveries, and its id."""
    if not element.startswith(MARK):
        return element, 1, b""
    count, uid = _WRAPPED.unpack_from(element, len(MARK))
    return element[len(MARK) + _WRAPPED.size :], count, uid


#: KEYS: a deduplication key. ARGV: ms of the lease.
DEDUP_CLAIM = Script(
    """
if redis.call('SET', KEYS[1], 'busy', 'NX', 'PX', ARGV[1]) then return 'mine' end
return redis.call('GET', KEYS[1])
"""
)

#: KEYS: a deduplication key that was claimed.
DEDUP_RELEASE = Script(
    """
if redis.call('GET', KEYS[1]) == 'busy' then return redis.call('DEL', KEYS[1]) end
return 0
"""
)
