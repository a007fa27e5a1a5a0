#!lua name=lepton_VERSION
-- Server functions. On the hot path results and small keys only, never a message's bytes (the server hashes every byte
-- of every string that enters Lua); messages come here where they are few (accept, retries, dead letters, suspects) or
-- where nothing else works (a broker out of memory refuses plain moves).
-- A function that fails half way is not rolled back: what can fail is checked before the first write, what comes after is
-- mostly a pcall, and a message leaves its list last, so that a failure runs a job again and never loses it. VERSION is the
-- hash of this file (queues/functions.py). Time is the server's.

local FINAL = { SUCCESS = true, FAILURE = true, REVOKED = true }
local LANE, LANES = 'lepton.ingest', 'lepton:lanes'
local RESULT, ENDED = 'celery-task-meta-', 'lepton:ended'
local SUFFIXES = { '\6\22high', '', '\6\0223', '\6\0226', '\6\0229' }
local AGAIN, ALONE = 'lepton:again', 'lepton:again.alone'
local ETA, ETA_MESSAGES = 'lepton:eta', 'lepton:eta.messages'
local ATTEMPTS, DEAD, PARTS = 'lepton:attempts', 'lepton:dead', 'lepton:chord.parts'
local DEAD_BYTES = 'lepton:dead.bytes'
local COUNTERS, EVENTS, HOLDERS = 'lepton:counters', 'lepton:events', 'lepton:holders'
local SWEPT, HOLD, PARKED = 'lepton:swept', 'lepton:hold', 'lepton:parked'
local BUNDLED, MOST_BUNDLED = 'lepton:bundled', 256
local TYPES = {
  [AGAIN] = 'list', [ALONE] = 'list', [ETA] = 'zset', [ETA_MESSAGES] = 'hash', [ATTEMPTS] = 'hash',
  [DEAD] = 'stream', [PARTS] = 'hash', [COUNTERS] = 'hash', [EVENTS] = 'stream', [HOLDERS] = 'set', [LANES] = 'set', [PARKED] = 'set',
}

local function is_type(key, expected)
  local found = redis.call('TYPE', key)['ok']
  return found == 'none' or found == expected
end

-- The error where one of our own keys holds something else, before anything is written; else nil.
local function wrong(...)
  for _, key in ipairs({ ... }) do
    if not is_type(key, TYPES[key]) then return redis.error_reply('WRONGTYPE ' .. key .. ' holds something else') end
  end
end

local function is_list(key) return is_type(key, 'list') end

local function now_ms()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end

local function count(name, by) redis.pcall('HINCRBY', COUNTERS, name, by) end

-- Celery's JSON and msgpack records both have the word `status` first and its value in capitals. A REVOKED without our
-- field is what a Celery worker wrote that heard of the revoke too, as each does of a job that it does not know: it ends
-- nothing, and whoever holds the job still ends it, with all that follows.
local function is_final(record)
  if type(record) ~= 'string' then return false end
  local status = string.match(string.sub(record, 1, 200), 'status[^%u]*(%u+)')
  if status == 'REVOKED' then -- our field as a key, in JSON or before a map of msgpack
    return string.find(record, string.sub(record, 1, 1) == '{' and '"lepton":' or '\166lepton[\128-\143]') ~= nil
  end
  return status ~= nil and FINAL[status] == true
end

-- Stores a job's record; false where it has a final one already, which stands. Of an ignored result (an empty record)
-- only that it was there, in a key of its own; `lepton:ended` is there as long as any of these.
local function store(id, record, ttl, has_ended)
  local key = RESULT .. id
  if record == '' then
    if is_final(redis.pcall('GET', key)) or not redis.call('SET', 'lepton:ended:' .. id, '', 'NX', 'EX', ttl) then
      return false
    end
    if not redis.call('SET', ENDED, '', 'NX', 'EX', ttl) then redis.pcall('EXPIRE', ENDED, ttl, 'GT') end
    return true
  end
  if has_ended and redis.call('EXISTS', 'lepton:ended:' .. id) == 1 then return false end
  if redis.call('SET', key, record, 'NX', 'EX', ttl) then return true end
  if is_final(redis.pcall('GET', key)) then return false end
  redis.pcall('SET', key, record, 'EX', ttl)
  return true
end

-- What is remembered of a job only until it ends: its attempts, where any job has some, and its key.
local function forget(id, ttl, has_attempts)
  if has_attempts then redis.pcall('HDEL', ATTEMPTS, id) end
  local is_keyed = string.byte(id, 15) == 53 -- '5', the version of a UUID that was made of a key
  if is_keyed then redis.pcall('EXPIRE', 'lepton:key:' .. id, ttl) end
end

local function tell(id, record, reply, ttl)
  if string.sub(reply, 1, 13) == 'lepton:reply:' then
    redis.pcall('RPUSH', reply, record)
    redis.pcall('EXPIRE', reply, ttl)
  else
    redis.pcall('PUBLISH', 'celery-task-meta-' .. id, record)
  end
end

local function emit(event, kept)
  if event ~= '' then redis.pcall('XADD', EVENTS, 'MAXLEN', '~', kept, '*', 'e', event) end
end

-- An event value (msgpack, a list of Events) without what it says of these jobs: nobody is told of a second end.
local function without(event, late)
  local kept = {}
  for _, each in ipairs(cmsgpack.unpack(event)) do
    local jobs = {}
    for _, id in ipairs(each['jobs'] or {}) do
      if not late[id] then jobs[#jobs + 1] = id end
    end
    each['jobs'] = jobs
    if #jobs > 0 then kept[#kept + 1] = each end
  end
  return #kept > 0 and cmsgpack.pack(kept) or ''
end

-- Keeps a dead letter, at the cost of the oldest where they take more than `most` bytes. What was added is summed up,
-- and only where that is too much (some may have been deleted since) is it measured: a full measure looks at every node
-- of the stream, and one of samples takes large letters behind small ones for small.
local function bury(most, id, kernel, code, reason, attempts, trace, message)
  local kept = redis.pcall('XADD', DEAD, '*', 'job', id, 'kernel', kernel, 'code', code, 'reason', reason,
    'attempts', attempts, 'trace', trace, 'message', message)
  most = tonumber(most)
  local size = redis.pcall('INCRBY', DEAD_BYTES, #message + #trace + #reason + 200)
  if type(size) == 'number' and size <= most then return kept end
  local length = redis.pcall('XLEN', DEAD)
  size = redis.pcall('MEMORY', 'USAGE', DEAD, 'SAMPLES', 0)
  while type(size) == 'number' and size > 0.9 * most and length > 1 do
    length = math.floor(length * 0.9)
    redis.pcall('XTRIM', DEAD, 'MAXLEN', length)
    size = redis.pcall('MEMORY', 'USAGE', DEAD, 'SAMPLES', 0)
  end
  if type(size) == 'number' then redis.pcall('SET', DEAD_BYTES, size) end
  return kept
end

-- Sends what follows a job; where its queue's key holds something else, it becomes a dead letter.
local function follow(id, list, message, dead_bytes)
  local pushed = type(redis.pcall('LPUSH', list, message)) == 'number'
  if not pushed then
    bury(dead_bytes, id, '', 'unreadable', 'its follow-up has no queue: ' .. list .. ' is none', 0, '', message)
  end
  return pushed and 1 or 0
end

-- What becomes of a blob whose job has ended. That of a duplicate is perhaps a dead letter's, which has said how long.
local function end_blob(key, kept_s, is_late)
  if is_late then redis.pcall('EXPIRE', key, 60, 'NX')
  elseif kept_s == 0 then redis.pcall('UNLINK', key)
  elseif kept_s > 0 then redis.pcall('EXPIRE', key, kept_s) end
end

-- Holds a message until its time. A second one of the same job is a duplicate, and is dropped.
local function hold_back(id, due_ms, message)
  if redis.call('HSETNX', ETA_MESSAGES, id, message) == 0 then
    count('duplicate', 1)
    return 0
  end
  redis.call('ZADD', ETA, due_ms, id)
  return 1
end

-- accept: jobs onto a lane, all or none. No allow-oom: a broker that is full takes no more.
-- ARGV ttl_s events_kept waiting_jobs waiting_bytes tenant_jobs tenant_bytes lane event n,
-- then for each job: list id fingerprint note event message. Returns for each 1, or 0 where it was there already.
-- A message may be a bundle of jobs (lepton_ai/bundle.py). How many more jobs than messages there are is counted by lane
-- until they leave their first claim (BUNDLED), and in the counter `bundled` from there on.
local function bundled_in(lane, messages)
  local extra = messages > 0 and tonumber(redis.pcall('HGET', BUNDLED, lane) or 0) or 0
  return math.max(0, math.min(extra, messages * (MOST_BUNDLED - 1)))
end

local function backlog(lane, with_bytes)
  local jobs, bytes = 0, 0
  for _, suffix in ipairs(SUFFIXES) do
    local waiting = redis.pcall('LLEN', lane .. suffix)
    if type(waiting) == 'number' and waiting > 0 then
      jobs = jobs + waiting
      if with_bytes then bytes = bytes + (redis.call('MEMORY', 'USAGE', lane .. suffix) or 0) end
    end
  end
  return jobs + bundled_in(lane, jobs), bytes
end

-- How many jobs are in a message, and its lane: what no router would take for a bundle is one job.
local function bundle_of(message)
  if not (string.find(message, '"bundle"', 1, true) or string.find(message, '\\u', 1, true)) then return 1, LANE end
  local readable, found = pcall(cjson.decode, message)
  local function at(value, name) return type(value) == 'table' and value[name] or nil end
  local count = readable and at(at(at(found, 'headers'), 'lepton'), 'bundle')
  if type(count) ~= 'number' or count < 2 or count > MOST_BUNDLED or count % 1 ~= 0 then return 1, LANE end
  local lane = at(at(at(found, 'properties'), 'delivery_info'), 'routing_key')
  return count, type(lane) == 'string' and string.sub(lane, 1, #LANE + 1) == LANE .. '.' and lane or LANE
end

local function room(lane, n, size, limits)
  local memory = redis.call('INFO', 'memory')
  local used = tonumber(string.match(memory, 'used_memory:(%d+)'))
  local most = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  local function limit(text, share)
    local given = tonumber(text)
    if given > 0 then return given end
    return most > 0 and most / share or math.huge
  end
  local own_bytes, all_bytes = limit(limits[4], 10), limit(limits[2], 4)
  local with_bytes = own_bytes < math.huge or all_bytes < math.huge
  if most > 0 and used + size > 0.8 * most then
    return string.format('OVERLOADED memory %d %d', used, 0.8 * most)
  end
  local jobs, bytes = backlog(LANE, with_bytes)
  local function quota(have_jobs, have_bytes)
    if have_jobs + n > tonumber(limits[3]) then
      return string.format('QUOTA jobs %d %s', have_jobs, limits[3])
    elseif have_bytes + size > own_bytes then
      return string.format('QUOTA bytes %d %d', have_bytes, own_bytes)
    end
  end
  local refused = nil
  if lane == LANE then refused = quota(jobs, bytes) else refused = quota(backlog(lane, with_bytes)) end
  for _, other in ipairs(redis.call('SMEMBERS', LANES)) do
    local its_jobs, its_bytes = backlog(other, with_bytes)
    jobs, bytes = jobs + its_jobs, bytes + its_bytes
  end
  for _, kernel in ipairs(redis.call('SMEMBERS', PARKED)) do
    local parked = 'lepton:parked:' .. kernel
    local its_jobs = redis.pcall('LLEN', parked)
    if type(its_jobs) == 'number' and its_jobs > 0 then
      jobs = jobs + its_jobs
      if with_bytes then bytes = bytes + redis.call('MEMORY', 'USAGE', parked) end
    end
  end
  jobs = jobs + redis.call('HLEN', ETA_MESSAGES)
  if with_bytes then bytes = bytes + (redis.call('MEMORY', 'USAGE', ETA_MESSAGES) or 0) end
  if jobs + n > tonumber(limits[1]) then
    return string.format('OVERLOADED jobs %d %s', jobs, limits[1])
  elseif bytes + size > all_bytes then
    return string.format('OVERLOADED bytes %d %d', bytes, all_bytes)
  end
  return refused
end

local function accept(_, args)
  local ttl, lane, n = tonumber(args[1]), args[7], tonumber(args[9])
  local bad = wrong(EVENTS, LANES, ETA_MESSAGES, PARKED)
  if bad then return bad end
  local found, fresh, size = {}, 0, 0
  local here = {}
  for job = 1, n do
    local at = 9 + (job - 1) * 6
    local list, id, fingerprint = args[at + 1], args[at + 2], args[at + 3]
    if not is_list(list) then return redis.error_reply('WRONGTYPE ' .. list .. ' holds something else') end
    local known = false
    if fingerprint ~= '' then
      known = here[id] or redis.call('GET', 'lepton:key:' .. id)
      if known and known ~= fingerprint then return redis.error_reply('KEYCONFLICT ' .. (job - 1)) end
      here[id] = fingerprint
    end
    found[job] = known and 0 or 1
    if not known then fresh, size = fresh + 1, size + #args[at + 6] end
  end
  if fresh > 0 then
    local refused = room(lane, fresh, size, { args[3], args[4], args[5], args[6] })
    if refused then return redis.error_reply(refused) end
  end
  local minutes = {}
  for job = 1, n do
    local at = 9 + (job - 1) * 6
    if found[job] == 1 then
      local id, fingerprint = args[at + 2], args[at + 3]
      if fingerprint ~= '' then redis.call('SET', 'lepton:key:' .. id, fingerprint, 'EX', 31 * 86400) end
      redis.call('LPUSH', args[at + 1], args[at + 6])
      if args[at + 4] ~= '' then
        -- Our ids (UUID version 7) carry their minute; another's is noted in this one.
        local stamp = string.sub(id, 15, 15) == '7' and tonumber(string.sub(id, 1, 8) .. string.sub(id, 10, 13), 16)
        local minute = math.floor((stamp or now_ms()) / 60000)
        minutes[minute] = true
        redis.pcall('HSETNX', string.format('lepton:jobs:%d', minute), id, args[at + 4])
      end
      emit(args[at + 5], args[2])
    end
  end
  for minute in pairs(minutes) do redis.pcall('EXPIRE', string.format('lepton:jobs:%d', minute), ttl) end
  if lane ~= LANE and fresh > 0 then redis.pcall('SADD', LANES, lane) end
  emit(args[8], args[2])
  return found
end

-- commit: how one held batch ended: results, acknowledgement, follow-ups, counters and event, in one step.
-- KEYS held lease
-- ARGV n ttl_s events_kept dead_bytes event, how many more jobs than messages, how many rows of what is carried by key,
--   each: id key version new_version ttl_s value (an empty value: a later row of the same key has it),
--   how many groups of jobs, each with its status reply_key n, and n times id record (an empty record: ignored; no reply_key: published for Celery's clients);
--   then counted sections:
--   pushes: id list message        retries: id delay_ms message
--   chord parts: id part           dead letters: id kernel code reason attempts trace message
--   blobs: id kept_s key (0: forgotten; below: the job goes on)
--   minutes: those whose placements are kept as long as these results
-- What a duplicate would have set off does not happen. Returns the ids that had a final result already. Refused whole,
-- as FENCED, unless the lease is alive and the held list is exactly the n messages that the worker took; and as STALE,
-- where a carried state has another version by now, or a job that it comes from has a final result.
local function fenced(held, lease, n)
  if redis.call('EXISTS', lease) == 0 then return redis.error_reply('FENCED the lease has lapsed') end
  if redis.call('LLEN', held) ~= n then return redis.error_reply('FENCED the held list is gone') end
end

local function stale(args, last)
  for at = 8, last, 6 do
    local id, key = args[at], args[at + 1]
    if not is_type(key, 'hash') then return redis.error_reply('WRONGTYPE ' .. key .. ' holds something else') end
    if (redis.call('HGET', key, 'version') or '') ~= args[at + 2] then return redis.error_reply('STALE ' .. key) end
    if is_final(redis.pcall('GET', RESULT .. id)) or redis.call('EXISTS', 'lepton:ended:' .. id) == 1 then
      return redis.error_reply('STALE ' .. id .. ' has ended')
    end
  end
end

local function commit(keys, args)
  local held, n, ttl = keys[1], tonumber(args[1]), tonumber(args[2])
  if not is_list(held) then return redis.error_reply('WRONGTYPE ' .. held .. ' holds something else') end
  local has_attempts, has_ended = false, false
  local bad = wrong(EVENTS, COUNTERS)
  if redis.call('EXISTS', ETA, ETA_MESSAGES, ATTEMPTS, DEAD, PARTS, ENDED) > 0 then -- one call, where all is well
    bad = bad or wrong(ETA, ETA_MESSAGES, ATTEMPTS, DEAD, PARTS)
    has_attempts, has_ended = redis.call('EXISTS', ATTEMPTS) == 1, redis.call('EXISTS', ENDED) == 1
  end
  bad = bad or fenced(held, keys[2], n)
  local last = 7 + 6 * tonumber(args[7])
  bad = bad or stale(args, last)
  if bad then return bad end
  for first = 8, last, 6 do
    if args[first + 5] ~= '' then
      redis.call('HSET', args[first + 1], 'version', args[first + 3], 'value', args[first + 5])
      redis.call('EXPIRE', args[first + 1], args[first + 4])
    end
  end
  local counts, duplicates, late = {}, {}, {}
  local at = last + 2
  for _ = 1, tonumber(args[last + 1]) do
    local status, reply, size = args[at], args[at + 1], tonumber(args[at + 2])
    local ends, awaited = status ~= 'retried', string.sub(reply, 1, 13) == 'lepton:reply:'
    local told, again = {}, 0
    for first = at + 3, at + 1 + 2 * size, 2 do
      local id, record = args[first], args[first + 1]
      if id ~= '' and status ~= 'duplicate' and not (record == '' and not ends) and not store(id, record, ttl, has_ended) then
        again, late[id] = again + 1, true
        duplicates[#duplicates + 1] = id
      elseif record ~= '' and ends then -- a retried one is not waited for
        if awaited then told[#told + 1] = record else redis.pcall('PUBLISH', RESULT .. id, record) end
      end
      if ends or late[id] then forget(id, ttl, has_attempts) end
    end
    if #told > 0 then
      for first = 1, #told, 1000 do redis.pcall('RPUSH', reply, unpack(told, first, math.min(#told, first + 999))) end
      redis.pcall('EXPIRE', reply, ttl)
    end
    counts[status] = (counts[status] or 0) + size - again
    counts.duplicate = (counts.duplicate or 0) + again
    at = at + 3 + 2 * size
  end
  local function section(width, each)
    local last = at + width * tonumber(args[at])
    for first = at + 1, last, width do each(first) end
    at = last + 1
  end
  section(3, function(first)
    if not late[args[first]] then follow(args[first], args[first + 1], args[first + 2], args[4]) end
  end)
  section(3, function(first)
    local id = args[first]
    if not late[id] then
      count('accepted', 1)
      hold_back(id, now_ms() + tonumber(args[first + 1]), args[first + 2])
    end
  end)
  section(2, function(first)
    if not late[args[first]] then redis.pcall('HSET', PARTS, args[first], args[first + 1]) end
  end)
  section(7, function(first)
    if not late[args[first]] then bury(args[4], unpack(args, first, first + 6)) end
  end)
  section(3, function(first)
    end_blob(args[first + 2], tonumber(args[first + 1]), late[args[first]])
  end)
  section(1, function(first) redis.pcall('EXPIRE', 'lepton:jobs:' .. args[first], ttl, 'GT') end)
  for status, number in pairs(counts) do
    if number > 0 then count(status, number) end
  end
  if args[6] ~= '0' then count('bundled', -tonumber(args[6])) end
  local event = args[5]
  if #duplicates > 0 then
    local readable, rest = pcall(without, event, late)
    event = readable and rest or event
  end
  emit(event, args[3])
  redis.call('DEL', held)
  return duplicates
end

-- finish: ends one job from outside a batch: its result, its waiter, its counter, and what it sets off. Meant to stand in
-- a transaction. ARGV ttl_s id status record reply_key dead_bytes chord_part, then the list and the message of each
-- follow-up. Returns 1, or 0 where it had a final result already.
local function finish(_, args)
  local ttl, id, status, record = tonumber(args[1]), args[2], args[3], args[4]
  forget(id, ttl, true)
  if not store(id, record, ttl, true) then
    count('duplicate', 1)
    return 0
  end
  if record ~= '' then tell(id, record, args[5], ttl) end
  count(status, 1)
  if args[7] ~= '' then redis.pcall('HSET', PARTS, id, args[7]) end
  for at = 8, #args, 2 do follow(id, args[at], args[at + 1], args[6]) end
  return 1
end

-- bury: a dead letter that has no waiter. ARGV dead_bytes id kernel code reason attempts trace message
local function bury_one(_, args)
  local bad = wrong(DEAD)
  if bad then return bad end
  count('dead', 1)
  return bury(unpack(args, 1, 8))
end

-- release: a batch that its worker gives back, unrun, in its old order. KEYS held lease
-- ARGV n flags oldest: of the messages, oldest first, `.` goes to again, `!` is a suspect, `=` stays. Refused, as FENCED,
-- also where `oldest` is not the oldest: another batch may be as long.
local function release(keys, args)
  local held, n, flags = keys[1], tonumber(args[1]), args[2]
  if not is_list(held) then return redis.error_reply('WRONGTYPE ' .. held .. ' holds something else') end
  local bad = wrong(AGAIN, ALONE) or fenced(held, keys[2], n)
  if bad then return bad end
  if redis.call('LINDEX', held, -1) ~= args[3] then return redis.error_reply('FENCED the held list is another') end
  local targets = { ['.'] = AGAIN, ['!'] = ALONE, ['='] = held }
  for at = 1, n do redis.call('LMOVE', held, targets[string.sub(flags, at, at)], 'RIGHT', 'LEFT') end
  return n
end

-- sweep: who is to be recovered. After a time in which nobody swept (the broker was away, or all routers were) every
-- holder first gets a whole lease to come back. Lanes that are empty are forgotten, and so is what bundles were counted in
-- them (somebody may have purged them). ARGV gap_ms lease_ms lists_each own_incarnation
-- Returns for each lapsed holder: incarnation, how many messages it held, and the held list of an only one (or '').
local function forget_bundles(holders, lists)
  for _, incarnation in ipairs(holders) do
    for number = 0, lists - 1 do
      if redis.call('EXISTS', 'lepton:claim:' .. incarnation .. ':' .. number) == 1 then return end
    end
  end
  for _, lane in ipairs(redis.pcall('HKEYS', BUNDLED)) do
    if backlog(lane, false) == 0 then redis.pcall('HDEL', BUNDLED, lane) end
  end
end

local function sweep(_, args)
  local bad = wrong(HOLDERS)
  if bad then return bad end
  local now, last = now_ms(), tonumber(redis.pcall('GET', SWEPT) or nil)
  redis.pcall('SET', SWEPT, string.format('%d', now))
  if last ~= nil and now - last > tonumber(args[1]) then redis.pcall('SET', HOLD, '', 'PX', args[2]) end
  for _, lane in ipairs(redis.pcall('SMEMBERS', LANES)) do
    if backlog(lane, false) == 0 then redis.pcall('SREM', LANES, lane) end
  end
  local holders = redis.call('SMEMBERS', HOLDERS)
  if redis.call('EXISTS', BUNDLED) == 1 then forget_bundles(holders, tonumber(args[3])) end
  if redis.call('EXISTS', HOLD) == 1 then return {} end
  local lapsed = {}
  if redis.call('SISMEMBER', HOLDERS, args[4]) == 0 then holders[#holders + 1] = args[4] end
  for _, incarnation in ipairs(holders) do
    if redis.call('EXISTS', 'lepton:lease:' .. incarnation) == 0 then
      local total, only = 0, ''
      for number = 0, tonumber(args[3]) - 1 do
        local list = 'lepton:held:' .. incarnation .. ':' .. number
        local length = redis.pcall('LLEN', list)
        if type(length) == 'number' and length > 0 then total, only = total + length, list end
      end
      lapsed[#lapsed + 1] = { incarnation, total, total == 1 and only or '' }
    end
  end
  return lapsed
end

-- recover: what a holder without a lease still holds. Claims go to `again`. So does a batch where its worker left in
-- good order; where it died, every job of it is a suspect and comes back alone, and one that was the only one counts
-- an attempt: with the last, it is a dead letter and its waiter is told. A holder is forgotten once it has been found
-- empty for a while: a blocking move that it had asked for may still have been served after its connection broke.
-- ARGV incarnation lists_each how (died or left) list, and where the list of a suspect is given:
--   message attempts_limit ttl_s events_kept dead_bytes id kernel reason record reply_key event blob_s, how many keys of
--   blobs and they, chord_part, then the list and the message of each follow-up. Where the list holds another message by now, nobody is to blame.
-- Returns how many messages moved, and 1 where the suspect died for good.
local REMEMBER_MS = 30000
local function recover(_, args)
  local bad = wrong(HOLDERS, AGAIN, ALONE, ATTEMPTS, DEAD, EVENTS, COUNTERS, PARTS)
  if bad then return bad end
  local incarnation, lists, how, suspect = args[1], tonumber(args[2]) - 1, args[3], args[4]
  local moved, died = 0, 0
  if redis.call('EXISTS', 'lepton:lease:' .. incarnation) == 1 then return { 0, 0 } end
  local function drain(prefix, target, each)
    for number = 0, lists do
      local list = prefix .. incarnation .. ':' .. number
      if redis.call('TYPE', list)['ok'] == 'list' then
        local message = redis.call('LMOVE', list, target, 'RIGHT', 'LEFT')
        while message do
          moved = moved + 1
          if each then each(message) end
          message = redis.call('LMOVE', list, target, 'RIGHT', 'LEFT')
        end
      end
    end
  end
  drain('lepton:claim:', AGAIN, function(message)
    local jobs, lane = bundle_of(message)
    count('accepted', jobs)
    if jobs > 1 then
      count('bundled', jobs - 1)
      redis.pcall('HINCRBY', BUNDLED, lane, 1 - jobs)
    end
  end)
  drain('lepton:reclaim:', AGAIN)
  drain('lepton:suspects:', ALONE)
  if how == 'died' and suspect ~= '' and is_list(suspect) and redis.call('LLEN', suspect) == 1
    and redis.call('LINDEX', suspect, 0) == args[5] then
    local id = args[10]
    local attempts = redis.pcall('HINCRBY', ATTEMPTS, id, 1)
    if type(attempts) == 'number' and attempts >= tonumber(args[6]) then
      moved = moved + 1
      local blobs = tonumber(args[17])
      local is_first = finish(_, { args[7], id, 'dead', args[13], args[14], args[9], unpack(args, 18 + blobs) }) == 1
      for at = 18, 17 + blobs do end_blob(args[at], tonumber(args[16]), not is_first) end
      if is_first then
        died = 1
        bury(args[9], id, args[11], 'poison', args[12], attempts, '', args[5])
        emit(args[15], args[8])
      end
      redis.call('DEL', suspect)
    end
  end
  drain('lepton:held:', how == 'died' and ALONE or AGAIN)
  local empty = 'lepton:empty:' .. incarnation
  if moved > 0 then
    redis.call('DEL', empty)
  else
    local left = redis.call('PTTL', empty)
    if left == -2 then
      redis.call('SET', empty, '', 'PX', 2 * REMEMBER_MS)
    elseif left < REMEMBER_MS then
      redis.call('SREM', HOLDERS, incarnation)
    end
  end
  return { moved, died }
end

-- move: as LMOVE, many times, for a broker that is full and refuses that. KEYS target sources...
-- ARGV limit incarnation. Returns the messages, oldest first.
local function move(keys, args)
  for _, key in ipairs(keys) do
    if not is_list(key) then return redis.error_reply('WRONGTYPE ' .. key .. ' holds something else') end
  end
  local bad = wrong(HOLDERS)
  if bad then return bad end
  redis.call('SADD', HOLDERS, args[2])
  local moved = {}
  for at = 2, #keys do
    while #moved < tonumber(args[1]) do
      local message = redis.call('LMOVE', keys[at], keys[1], 'RIGHT', 'LEFT')
      if not message then break end
      moved[#moved + 1] = message
    end
  end
  return moved
end

-- schedule: holds a message back until its time. Meant to stand in a transaction. ARGV id due_ms message
local function schedule(_, args)
  return wrong(ETA, ETA_MESSAGES) or hold_back(args[1], tonumber(args[2]), args[3])
end

-- transact: as MULTI behind WATCH, for few small messages, or a broker that is full and refuses writes. KEYS the lists that
-- must have the lengths that ARGV names first ('' for any); then the commands, each as the number of its words and the
-- words. Returns how many commands were done, or -1 where a list is not as long as it must be.
local INSIDE = { -- those of these functions that stand in a transaction, by their names: a function may not FCALL
  lepton_schedule_VERSION = schedule,
  lepton_finish_VERSION = finish,
  lepton_bury_VERSION = bury_one,
}
local MOST_WORDS = 7000
local function transact(keys, args)
  for at, key in ipairs(keys) do
    local length = redis.call('LLEN', key)
    if args[at] ~= '' and length ~= tonumber(args[at]) then return -1 end
  end
  -- Lua hands on no more words than this at once, and it must not find out in the midst.
  local at, done = #keys + 1, 0
  while at <= #args do
    local words = tonumber(args[at])
    if words > MOST_WORDS then return redis.error_reply('TOOLONG a command of ' .. words .. ' words') end
    at = at + words + 1
  end
  at = #keys + 1
  while at <= #args do
    local words = tonumber(args[at])
    local own = args[at + 1] == 'FCALL' and INSIDE[args[at + 2]]
    if own then
      pcall(own, {}, { unpack(args, at + 4, at + words) })
    else
      redis.pcall(unpack(args, at + 1, at + words))
    end
    at, done = at + words + 1, done + 1
  end
  return done
end

-- announce: takes the lease. KEYS lease   ARGV value lease_ms incarnation
local function announce(keys, args)
  local bad = wrong(HOLDERS)
  if bad then return bad end
  redis.call('SET', keys[1], args[1], 'PX', args[2])
  redis.call('SADD', HOLDERS, args[3])
  return 1
end

-- due: what has waited long enough goes to `again`, at most `limit`; with ids, those at once. ARGV limit ids...
-- Returns how many moved, and the milliseconds until the next is due (-1 where none waits).
local function due(_, args)
  local bad = wrong(ETA, ETA_MESSAGES, AGAIN)
  if bad then return bad end
  local now, moved = now_ms(), 0
  local ids = { unpack(args, 2) }
  if #ids == 0 then ids = redis.call('ZRANGEBYSCORE', ETA, '-inf', now, 'LIMIT', 0, args[1]) end
  for _, id in ipairs(ids) do
    local message = redis.call('HGET', ETA_MESSAGES, id)
    if message then
      redis.call('LPUSH', AGAIN, message)
      moved = moved + 1
    end
    redis.call('HDEL', ETA_MESSAGES, id)
    redis.call('ZREM', ETA, id)
  end
  local first = redis.call('ZRANGE', ETA, 0, 0, 'WITHSCORES')
  return { moved, first[2] and math.max(0, math.ceil(tonumber(first[2]) - now)) or -1 }
end

-- unpark: parked jobs of a kernel go to `again`, its suspects to `again.alone`; with messages, only those.
-- ARGV kernel limit messages... Returns how many moved.
local function unpark(_, args)
  local parked, alone, moved = 'lepton:parked:' .. args[1], 'lepton:parked.alone:' .. args[1], 0
  if not (is_list(parked) and is_list(alone)) then
    return redis.error_reply('WRONGTYPE ' .. parked .. ' holds something else')
  end
  local bad = wrong(AGAIN, ALONE)
  if bad then return bad end
  for source, target in pairs({ [parked] = AGAIN, [alone] = ALONE }) do
    for at = 3, #args do
      if redis.call('LPOS', source, args[at]) then
        redis.call('LPUSH', target, args[at])
        redis.call('LREM', source, -1, args[at])
        moved = moved + 1
      end
    end
    while #args == 2 and moved < tonumber(args[2]) and redis.call('LMOVE', source, target, 'RIGHT', 'LEFT') do moved = moved + 1 end
  end
  if redis.call('EXISTS', parked, alone) == 0 then
    redis.pcall('SREM', PARKED, args[1])
    redis.pcall('ZREM', 'lepton:deadlines', args[1])
  end
  return moved
end

-- sizes: every counter and the length of everything that holds messages, at one moment. Returns name, value, ...
-- A message counts as accepted once it has left the first claim it was in: before that it waits in a lane.
local ENDS = { 'succeeded', 'failed', 'cancelled', 'expired', 'dead', 'retried', 'duplicate' }
local function sizes(_, args)
  local found, order = {}, {}
  local function note(name, value)
    if found[name] == nil then order[#order + 1] = name end
    found[name] = (found[name] or 0) + value
  end
  local function length(command, key)
    local value = redis.pcall(command, key)
    return type(value) == 'number' and value or 0
  end
  for _, name in ipairs({ 'accepted', 'bundled' }) do note(name, 0) end
  for _, name in ipairs(ENDS) do note(name, 0) end
  local counters = redis.pcall('HGETALL', COUNTERS)
  for at = 1, #counters, 2 do note(counters[at], tonumber(counters[at + 1]) or 0) end
  local lanes = redis.pcall('SMEMBERS', LANES)
  lanes[#lanes + 1] = LANE
  local messages, extra = 0, 0
  for _, lane in ipairs(lanes) do
    for _, suffix in ipairs(SUFFIXES) do messages = messages + length('LLEN', lane .. suffix) end
  end
  -- Of every lane: one that is empty is forgotten, and what came from it may still be in a claim.
  for _, bundled in ipairs(redis.pcall('HVALS', BUNDLED)) do extra = extra + math.max(0, tonumber(bundled) or 0) end
  note('lanes', messages)
  for _, name in ipairs({ 'claimed', 'again', 'alone', 'reclaimed', 'parked_now', 'scheduled_now', 'queued', 'held' }) do
    note(name, 0)
  end
  local holders = redis.pcall('SMEMBERS', HOLDERS)
  for _, incarnation in ipairs(holders) do
    for number = 0, tonumber(args[1] or 64) - 1 do
      local tail = incarnation .. ':' .. number
      note('claimed', length('LLEN', 'lepton:claim:' .. tail))
      note('reclaimed', length('LLEN', 'lepton:reclaim:' .. tail) + length('LLEN', 'lepton:suspects:' .. tail))
      note('held', length('LLEN', 'lepton:held:' .. tail))
    end
  end
  note('again', length('LLEN', AGAIN))
  note('alone', length('LLEN', ALONE))
  note('scheduled_now', length('HLEN', ETA_MESSAGES))
  local kernels = redis.pcall('SMEMBERS', PARKED)
  for _, kernel in ipairs(kernels) do
    note('parked_now', length('LLEN', 'lepton:parked:' .. kernel) + length('LLEN', 'lepton:parked.alone:' .. kernel))
  end
  local devices = redis.pcall('SMEMBERS', 'lepton:devices')
  for _, device in ipairs(devices) do
    note('queued', length('LLEN', 'lepton.' .. device) + length('LLEN', 'lepton.' .. device .. '.alone'))
  end
  note('dead_letters', length('XLEN', DEAD))
  -- What waits in a lane or a first claim is accepted, and not counted yet.
  note('lanes', math.min(extra, (found['lanes'] + found['claimed']) * (MOST_BUNDLED - 1)))
  local new = found['lanes'] + found['claimed']
  local waiting = found['again'] + found['alone'] + found['reclaimed'] + found['parked_now'] + found['scheduled_now']
  -- Nearly all bundles that have been placed are on a device's queue or with a worker.
  local in_flight = found['queued'] + found['held'] + found['bundled']
  local ended = 0
  for _, name in ipairs(ENDS) do ended = ended + found[name] end
  note('difference', found['accepted'] - ended - waiting - in_flight)
  note('accepted', new)
  note('waiting', new + waiting)
  note('in_flight', in_flight)
  local flat = {}
  for _, name in ipairs(order) do
    flat[#flat + 1] = name
    flat[#flat + 1] = found[name]
  end
  return flat
end


local function register(name, callback, flags)
  redis.register_function{ function_name = 'lepton_' .. name .. '_VERSION', callback = callback, flags = flags }
end

register('accept', accept, {})
register('commit', commit, { 'allow-oom' })
register('finish', finish, { 'allow-oom' })
register('bury', bury_one, { 'allow-oom' })
register('release', release, { 'allow-oom' })
register('sweep', sweep, { 'allow-oom' })
register('recover', recover, { 'allow-oom' })
register('move', move, { 'allow-oom' })
register('transact', transact, { 'allow-oom' })
register('announce', announce, { 'allow-oom' })
register('schedule', schedule, { 'allow-oom' })
register('due', due, { 'allow-oom' })
register('unpark', unpark, { 'allow-oom' })
register('sizes', sizes, { 'no-writes' })
