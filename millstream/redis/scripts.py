"""What Redis does for us in one step, in Lua.

Each group of a stream, and each list, has siblings: a sorted set of its members and when they
gave a sign of life last (``alive``, in ms of the server's clock), a sorted set of what waits
for its next delivery and when that is due (``later``), and a hash of messages whose last attempt
began (``begun``). What waits in a stream belongs to the consumer ``~later`` meanwhile, so that
nobody's end concerns it.

An element of a list that is taken gets an id and lies in a hash of its member (``taken``). An
element that was delivered before is wrapped: its number of deliveries and its id stand before it.
A member that waits for something new has it moved to a list that all members share (``next``),
and takes it from there.

A process whose last sign of life is too old counts as dead, and another one takes over what it
had taken. A consumer that never gave one is not ours: its entries are taken over by their age.

A server without memory refuses a script whose first command may need some, and lets a script
go on that has written: a command that changes nothing comes first.
"""

from __future__ import annotations

import struct

from .wire import Script

#: How a wrapped element of a list begins: a zero, the number of deliveries, the length of the id.
_WRAPPED = struct.Struct(">BIB")

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
redis.call('ZREM', alive, '')
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

#: KEYS: stream, later. ARGV: group, me, ms until the next delivery, whether the present one did
#: not begin, ids.
STREAM_NACK = Script(
    _NOW
    + """
local stream, later, group, me = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local due, fresh = now + tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 5, #ARGV do
  local id = ARGV[i]
  local p = redis.call('XPENDING', stream, group, id, id, 1)
  if #p > 0 and p[1][2] == me then
    local count = p[1][4] - fresh
    redis.call('XCLAIM', stream, group, '~later', 0, id, 'RETRYCOUNT', count, 'JUSTID')
    redis.call('ZADD', later, due, id)
  end
end
return 1
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

_LIST = r"""
local function open(value)
  if string.byte(value) ~= 0 then return value, 1 end
  local _, count, size = struct.unpack('>BI4B', value)
  return string.sub(value, 7 + size), count, string.sub(value, 7, 6 + size)
end
local function wrap(element, count, id)
  return struct.pack('>BI4B', 0, count, #id) .. id .. element
end
"""

#: Takes elements from ``from``, gives them their ids, and holds them in the hash ``taken``.
_MOVE = """
local number = tonumber(ARGV[2])
local function move(from, taken, room)
  if room < 1 then return {} end
  local found, fields = redis.call('LRANGE', from, 0, math.min(room, 1000) - 1), {}
  for i = 1, #found do
    local element, id = found[i], ARGV[1] .. '-' .. number
    fields[2 * i - 1] = id
    fields[2 * i] = string.byte(element) == 0 and wrap(element, 1, id) or element
    number = number + 1
  end
  if #found > 0 then
    redis.call('HSET', taken, unpack(fields))
    redis.call('LTRIM', from, #found, -1)
  end
  return found
end
"""

#: KEYS: list, next, taken. ARGV: me, the number of the first, how many. Gives the elements.
LIST_TAKE = Script(
    _LIST
    + _MOVE
    + """
redis.call('HDEL', KEYS[3], '')
local room = tonumber(ARGV[3])
local first = move(KEYS[2], KEYS[3], room)
local found = move(KEYS[1], KEYS[3], room - #first)
if #first == 0 then return found end
for i = 1, #found do first[#first + 1] = found[i] end
return first
"""
)

#: KEYS: next, taken, alive, later. ARGV: me, the number of the first, ms until a silent member is
#: dead, how many due elements to take, how many of dead members, how the name of what a member
#: has taken begins. Gives elements that are new, then ids and elements of others, whether there
#: are more, ms until the next is due, how many elements are ours.
LIST_TICK = Script(
    _NOW
    + _LIST
    + _MOVE
    + """
local taken, alive, later, me = KEYS[2], KEYS[3], KEYS[4], ARGV[1]
local ttl, room, dead_room = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREM', alive, '')
redis.call('ZADD', alive, now, me)
local out = move(KEYS[1], taken, room)
local again, more = {}, 0
local function take(value, id)
  local element, count, known = open(value)
  id = known or id
  redis.call('HSET', taken, id, wrap(element, count + 1, id))
  again[#again + 1] = id
  again[#again + 1] = wrap(element, count + 1, id)
end
for _, value in ipairs(redis.call('ZRANGEBYSCORE', later, '-inf', now, 'LIMIT', 0, room - #out)) do
  take(value)
  redis.call('ZREM', later, value)
end
local function number_of(id) return tonumber(string.match(id, '%d+$')) end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', alive, '-inf', now - ttl)) do
  local theirs = ARGV[6] .. name
  local ids = redis.call('HKEYS', theirs)
  table.sort(ids, function(a, b) return number_of(a) < number_of(b) end)
  for _, id in ipairs(ids) do
    if dead_room < 1 then more = 1; break end
    take(redis.call('HGET', theirs, id), id)
    redis.call('HDEL', theirs, id)
    dead_room = dead_room - 1
  end
  if redis.call('EXISTS', theirs) == 0 then redis.call('ZREM', alive, name) end
end
local next = redis.call('ZRANGE', later, 0, 0, 'WITHSCORES')
local due = -1
if #next > 0 then due = math.max(tonumber(next[2]) - now, 0) end
return {out, again, more, due, redis.call('HLEN', taken)}
"""
)

#: KEYS: list, taken, later. ARGV: ms until the next delivery, whether the present one did not
#: begin, ids.
LIST_NACK = Script(
    _NOW
    + _LIST
    + """
local due, fresh = now + tonumber(ARGV[1]), tonumber(ARGV[2])
redis.call('HDEL', KEYS[2], '')
for i = #ARGV, 3, -1 do
  local id = ARGV[i]
  local value = redis.call('HGET', KEYS[2], id)
  if value then
    local element, count = open(value)
    if count - fresh == 0 then
      redis.call('LPUSH', KEYS[1], element)
    else
      redis.call('ZADD', KEYS[3], due, wrap(element, count - fresh, id))
    end
    redis.call('HDEL', KEYS[2], id)
  end
end
return 1
"""
)

#: KEYS: list, next, taken, alive. ARGV: me.
LIST_LEAVE = Script(
    """
while redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') do end
if redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('ZREM', KEYS[4], ARGV[1])
else
  redis.call('ZADD', KEYS[4], 0, ARGV[1])
end
return 1
"""
)


def unwrap(value: bytes) -> tuple[bytes, int]:
    """The element in a value of what was taken, and its number of deliveries."""
    if value[:1] != b"\0":
        return value, 1
    _, count, size = _WRAPPED.unpack_from(value)
    return value[_WRAPPED.size + size :], count


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
