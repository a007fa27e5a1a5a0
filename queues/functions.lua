#!lua name=lepton_VERSION
-- Server functions: results and small keys only, never a message's bytes (the server hashes every byte of every
-- string that enters Lua). A function that fails half way is not rolled back, so everything that can fail is checked
-- before the first write and what comes after it is a pcall. VERSION is the hash of this file (queues/broker.py).

local FINAL = { SUCCESS = true, FAILURE = true, REVOKED = true }

-- Celery's JSON and msgpack records both have the word `status` first and its value in capitals.
local function is_final(record)
  if type(record) ~= 'string' then return false end
  local status = string.match(record, 'status[^%u]*(%u+)')
  return status ~= nil and FINAL[status] == true
end

local function is_type(key, expected)
  local found = redis.call('TYPE', key)['ok']
  return found == 'none' or found == expected
end

-- commit: the results of one held batch, its acknowledgement, counters and event, in one step.
-- KEYS held lease events counters
-- ARGV n ttl_s events_kept event, then for each job: id status record reply_key
-- (an empty record: the result is ignored; an empty reply_key: published for Celery's own clients)
-- Returns the ids that had a final result already. Refused whole, as FENCED, unless the lease is alive and the held
-- list is exactly the n messages that the worker took.
local function commit(keys, args)
  local held, lease, events, counters = keys[1], keys[2], keys[3], keys[4]
  local n, ttl = tonumber(args[1]), tonumber(args[2])
  if not (is_type(held, 'list') and is_type(events, 'stream') and is_type(counters, 'hash')) then
    return redis.error_reply('WRONGTYPE a key of lepton holds something else')
  end
  if redis.call('EXISTS', lease) == 0 or redis.call('LLEN', held) ~= n then
    return redis.error_reply('FENCED the lease or the held list is gone')
  end
  redis.call('DEL', held)
  local counts, replies, order, duplicates = {}, {}, {}, {}
  for at = 5, #args, 4 do
    local id, status, record, reply = args[at], args[at + 1], args[at + 2], args[at + 3]
    local key, fresh = 'celery-task-meta-' .. id, true
    if record ~= '' then
      if not redis.call('SET', key, record, 'NX', 'EX', ttl) then
        if is_final(redis.pcall('GET', key)) then
          fresh = false
        else
          redis.pcall('SET', key, record, 'EX', ttl)
        end
      end
    end
    if not fresh then
      status = 'duplicate'
      duplicates[#duplicates + 1] = id
    elseif record ~= '' and string.sub(reply, 1, 13) ~= 'lepton:reply:' then
      redis.pcall('PUBLISH', key, record)
    elseif record ~= '' then
      if replies[reply] == nil then
        replies[reply] = {}
        order[#order + 1] = reply
      end
      table.insert(replies[reply], record)
    end
    counts[status] = (counts[status] or 0) + 1
  end
  for _, reply in ipairs(order) do
    redis.pcall('RPUSH', reply, unpack(replies[reply]))
    redis.pcall('EXPIRE', reply, ttl)
  end
  for status, count in pairs(counts) do
    redis.pcall('HINCRBY', counters, status, count)
  end
  redis.pcall('XADD', events, 'MAXLEN', '~', args[3], '*', 'e', args[4])
  return duplicates
end

-- release: a batch that its worker gives back unrun, in its old order, without an attempt.
-- KEYS held lease again     ARGV n
local function release(keys, args)
  if not (is_type(keys[1], 'list') and is_type(keys[3], 'list')) then
    return redis.error_reply('WRONGTYPE a key of lepton holds something else')
  end
  if redis.call('EXISTS', keys[2]) == 0 or redis.call('LLEN', keys[1]) ~= tonumber(args[1]) then
    return redis.error_reply('FENCED the lease or the held list is gone')
  end
  for _ = 1, tonumber(args[1]) do
    redis.call('LMOVE', keys[1], keys[3], 'RIGHT', 'LEFT')
  end
  return tonumber(args[1])
end

-- recover: what a holder without a lease still holds goes to `again`. A holder is forgotten once it has been found
-- empty for a while: a blocking move that it had asked for may still have been served after its connection broke.
-- KEYS holders again        ARGV incarnation lists_each
local REMEMBER_MS = 30000
local function recover(keys, args)
  if not (is_type(keys[1], 'set') and is_type(keys[2], 'list')) then
    return redis.error_reply('WRONGTYPE a key of lepton holds something else')
  end
  local incarnation, moved = args[1], 0
  if redis.call('EXISTS', 'lepton:lease:' .. incarnation) == 1 then return 0 end
  for _, prefix in ipairs({ 'lepton:held:', 'lepton:claim:' }) do
    for number = 0, tonumber(args[2]) - 1 do
      local list = prefix .. incarnation .. ':' .. number
      if redis.call('TYPE', list)['ok'] == 'list' then
        while redis.call('LMOVE', list, keys[2], 'RIGHT', 'LEFT') do moved = moved + 1 end
      end
    end
  end
  local empty = 'lepton:empty:' .. incarnation
  if moved > 0 then
    redis.call('DEL', empty)
  else
    local left = redis.call('PTTL', empty)
    if left == -2 then
      redis.call('SET', empty, '', 'PX', 2 * REMEMBER_MS)
    elseif left < REMEMBER_MS then
      redis.call('SREM', keys[1], incarnation)
    end
  end
  return moved
end

redis.register_function{ function_name = 'lepton_commit_VERSION', callback = commit, flags = { 'allow-oom' } }
redis.register_function{ function_name = 'lepton_release_VERSION', callback = release, flags = { 'allow-oom' } }
redis.register_function{ function_name = 'lepton_recover_VERSION', callback = recover, flags = { 'allow-oom' } }
