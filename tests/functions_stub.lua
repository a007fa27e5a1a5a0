#!lua name=lepton_stub_VERSION
-- Until the branch with the real ones is merged: its `accept` and `sizes`, so that the doors can be tested.
local LANE, LANES = 'lepton.ingest', 'lepton:lanes'
local SUFFIXES = { '\6\22high', '', '\6\0223', '\6\0226', '\6\0229' }
local AGAIN, ALONE = 'lepton:again', 'lepton:again.alone'
local ETA, ETA_MESSAGES = 'lepton:eta', 'lepton:eta.messages'
local ATTEMPTS, DEAD, PARTS = 'lepton:attempts', 'lepton:dead', 'lepton:chord.parts'
local COUNTERS, EVENTS, HOLDERS = 'lepton:counters', 'lepton:events', 'lepton:holders'
local SWEPT, HOLD = 'lepton:swept', 'lepton:hold'
local TYPES = {
  [AGAIN] = 'list', [ALONE] = 'list', [ETA] = 'zset', [ETA_MESSAGES] = 'hash', [ATTEMPTS] = 'hash',
  [DEAD] = 'stream', [PARTS] = 'hash', [COUNTERS] = 'hash', [EVENTS] = 'stream', [HOLDERS] = 'set', [LANES] = 'set',
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

local function emit(event, kept)
  if event ~= '' then redis.pcall('XADD', EVENTS, 'MAXLEN', '~', kept, '*', 'e', event) end
end

-- accept: jobs onto a lane, all or none. No allow-oom: a broker that is full takes no more.
-- ARGV ttl_s events_kept waiting_jobs waiting_bytes tenant_jobs tenant_bytes lane event n,
-- then for each job: list id fingerprint note event message. Returns for each 1, or 0 where it was there already.
local function backlog(lane, with_bytes)
  local jobs, bytes = 0, 0
  for _, suffix in ipairs(SUFFIXES) do
    local waiting = redis.pcall('LLEN', lane .. suffix)
    if type(waiting) == 'number' and waiting > 0 then
      jobs = jobs + waiting
      if with_bytes then bytes = bytes + (redis.call('MEMORY', 'USAGE', lane .. suffix) or 0) end
    end
  end
  return jobs, bytes
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
  if lane == LANE then refused = quota(jobs, bytes) end
  for _, other in ipairs(redis.call('SMEMBERS', LANES)) do
    local its_jobs, its_bytes = backlog(other, with_bytes)
    jobs, bytes = jobs + its_jobs, bytes + its_bytes
    if lane == other then refused = quota(its_jobs, its_bytes) end
  end
  if jobs + n > tonumber(limits[1]) then
    return string.format('OVERLOADED jobs %d %s', jobs, limits[1])
  elseif bytes + size > all_bytes then
    return string.format('OVERLOADED bytes %d %d', bytes, all_bytes)
  end
  return refused
end

local function accept(_, args)
  local ttl, lane, n = tonumber(args[1]), args[7], tonumber(args[9])
  local bad = wrong(EVENTS, LANES)
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
  note('accepted', 0)
  for _, name in ipairs(ENDS) do note(name, 0) end
  local counters = redis.pcall('HGETALL', COUNTERS)
  for at = 1, #counters, 2 do note(counters[at], tonumber(counters[at + 1]) or 0) end
  note('lanes', (backlog(LANE, false)))
  local lanes = redis.pcall('SMEMBERS', LANES)
  for _, lane in ipairs(lanes) do note('lanes', (backlog(lane, false))) end
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
  local kernels = redis.pcall('SMEMBERS', 'lepton:parked')
  for _, kernel in ipairs(kernels) do note('parked_now', length('LLEN', 'lepton:parked:' .. kernel)) end
  local devices = redis.pcall('SMEMBERS', 'lepton:devices')
  for _, device in ipairs(devices) do
    note('queued', length('LLEN', 'lepton.' .. device) + length('LLEN', 'lepton.' .. device .. '.alone'))
  end
  note('dead_letters', length('XLEN', DEAD))
  -- What waits in a lane or a first claim is accepted, and not counted yet.
  local new = found['lanes'] + found['claimed']
  local waiting = found['again'] + found['alone'] + found['reclaimed'] + found['parked_now'] + found['scheduled_now']
  local in_flight = found['queued'] + found['held']
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


redis.register_function{ function_name = 'lepton_accept_VERSION', callback = accept, flags = {} }
redis.register_function{ function_name = 'lepton_sizes_VERSION', callback = sizes, flags = { 'no-writes' } }
