-- For haproxy.cfg beside it: which model a request means, and which host of backend "llmux" has it.
--
-- A host says at /health/weights how well it serves each model: from AWAKE on a request finds the model
-- there, from COMING on it finds it soon, at 0 it cannot have it. Where a model is awake it is asked
-- for in turns. Where it is coming, or asleep everywhere, all ask the same host for it, its home.

local AWAKE, COMING = 100, 50
local EVERY_MS, STALE_S = 250, 5

local hosts = {} -- name → its weights by model, heard when, and whether HAProxy would use it
local models = {} -- name or alias → model
local order = {} -- model → all hosts, its home first
local turns = {} -- model → how often it was found awake

-- ---- homes --------------------------------------------------------------------------------------

local function score(text)
  local hash = 5381
  for at = 1, #text do
    hash = ((hash * 33) ~ text:byte(at)) & 0xffffffff
  end
  hash = ((hash ~ (hash >> 15)) * 0x2c1b3c6d) & 0xffffffff
  return hash ~ (hash >> 12)
end

-- Every proxy finds the same homes. No host is home to two models more than another, and a model
-- that comes or goes moves few others.
local function find_homes()
  local names, all, count = {}, {}, {}
  for name, host in pairs(hosts) do
    all[#all + 1], count[name] = name, 0
    for model in pairs(host.weights) do names[model] = true end
  end
  local sorted = {}
  for model in pairs(names) do sorted[#sorted + 1] = model end
  table.sort(sorted)
  local least, most = #sorted // #all, -(-#sorted // #all)
  local function fullness(host)
    return count[host] < least and 0 or count[host] < most and 1 or 2
  end
  for _, model in ipairs(sorted) do
    local ranks = {}
    for _, host in ipairs(all) do ranks[host] = score(model .. "\n" .. host) end
    local by_rank = { table.unpack(all) }
    table.sort(by_rank, function(a, b)
      local a_full, b_full = fullness(a), fullness(b)
      if a_full ~= b_full then return a_full < b_full end
      return ranks[a] > ranks[b] or ranks[a] == ranks[b] and a < b
    end)
    for _, host in ipairs(by_rank) do
      if hosts[host].weights[model] then
        count[host] = count[host] + 1
        break
      end
    end
    order[model] = by_rank
  end
end

-- ---- what the hosts say ---------------------------------------------------------------------------

local function hear(host, text)
  local weights, new = {}, false
  for weight, line in text:gmatch("(%d+) ([^\n]+)\n") do
    local model = line:match("^[^\t]+")
    weights[model] = tonumber(weight)
    new = new or not host.weights[model]
    for called in line:gmatch("[^\t]+") do models[called] = model end
  end
  host.weights, host.heard = weights, core.now().sec
  if new then find_homes() end
end

local function watch(name, server)
  local host = hosts[name]
  while true do
    -- By way of a frontend of our own, so that this has the TLS and the key that "server" lines say.
    local answer = core.httpclient():get({
      url = "http://llmux/health/weights",
      dst = os.getenv("LLMUX_WEIGHTS"),
      headers = { ["x-llmux-host"] = { name }, accept = { "text/plain" } },
      timeout = 2000,
    })
    if answer and answer.status == 200 then hear(host, answer.body) end
    local status = server:get_stats().status or ""
    host.up = status:find("^UP") ~= nil or status == "no check"
    core.msleep(EVERY_MS)
  end
end

core.register_init(function()
  for name, server in pairs(core.backends["llmux"].servers) do
    hosts[name] = { weights = {}, heard = 0, up = false }
    core.register_task(function() watch(name, server) end)
  end
end)

-- ---- the host for a request -----------------------------------------------------------------------

core.register_action("llmux_host", { "http-req" }, function(txn)
  local called = txn:get_var("txn.model")
  local model = models[called]
  if not model then return end -- unknown here: any host can say so
  local oldest = core.now().sec - STALE_S
  local awake, best, coming = {}, nil, false
  for _, name in ipairs(order[model]) do
    local host = hosts[name]
    local weight = host.weights[model] or 0
    if host.up and host.heard >= oldest and weight > 0 then
      if weight >= AWAKE then
        awake[#awake + 1] = name
      elseif not best or weight >= COMING and not coming then
        best, coming = name, weight >= COMING
      end
    end
  end
  if #awake > 0 then
    turns[model] = (turns[model] or 0) + 1
    best = awake[turns[model] % #awake + 1]
  end
  if best then
    txn:set_var("txn.host", best)
    txn:set_var("txn.found", #awake > 0 and "awake" or coming and "coming" or "asleep")
  end
end)

-- For operators, on the admin socket: each model, and every host's weight for it, its home first.
core.register_cli({ "show", "llmux" }, "show llmux : models, their hosts and weights", function(applet)
  for model, ranked in pairs(order) do
    local line = model
    for _, name in ipairs(ranked) do
      local host = hosts[name]
      line = line .. "\t" .. name .. "=" .. (host.up and host.weights[model] or "-")
    end
    applet:send(line .. "\n")
  end
end)

-- ---- the model of a request, where HAProxy's own json_query finds none ----------------------------
-- That is multipart, keys or names written with escapes, and nesting deeper than it follows.

local function past_string(body, quote)
  local from = quote + 1
  while true do
    local at = body:find('"', from, true)
    if not at then return #body + 1 end
    local before = at - 1
    while body:byte(before) == 92 do before = before - 1 end
    if (at - before) % 2 == 1 then return at + 1 end
    from = at + 1
  end
end

local function unescaped(text)
  text = text:gsub("\\u(%x%x%x%x)", function(code) return utf8.char(tonumber(code, 16)) end)
  return (text:gsub("\\(.)", "%1"))
end

local function in_json(body)
  local at, depth, model = 1, 0, nil
  while true do
    at = body:find('["{}%[%]]', at)
    if not at then return model end
    local byte = body:byte(at)
    if byte == 34 then
      local stop = past_string(body, at)
      local value = depth == 1 and body:match('^%s*:%s*()"', stop)
      if value and unescaped(body:sub(at + 1, stop - 2)) == "model" then
        stop = past_string(body, value)
        model = unescaped(body:sub(value + 1, stop - 2))
      end
      at = stop
    else
      depth = depth + ((byte == 123 or byte == 91) and 1 or -1)
      at = at + 1
    end
  end
end

local function in_form(body, boundary)
  local at = body:find("--" .. boundary, 1, true)
  while at do
    local from, to = body:find("\r\n\r\n", at, true)
    if not from then return nil end
    local head = body:sub(at, from):lower()
    at = body:find("\r\n--" .. boundary, to - 1, true)
    if at and (head:find('[; ]name="model"') or head:find("[; ]name=model[;\r]")) then
      return body:sub(to + 1, at - 1)
    end
  end
end

core.register_action("llmux_model", { "http-req" }, function(txn)
  local body = txn.f:req_body()
  if not body then return end
  local boundary = (txn.f:req_hdr("content-type") or ""):match('boundary="?([^";]+)')
  local model = boundary and in_form(body, boundary) or not boundary and in_json(body)
  if model then txn:set_var("txn.model", model) end
end)
