--- Where the time goes: spans, totals, Chrome traces, the flight recorder.
-- The engine counts every op, forward and backward, by itself. Recipes and scripts add names of their own.
--
--    local trace = require "halo.trace"
--    trace.reset()
--    trace.span("data", function() batch = loader:next() end)
--    print(trace.table(12))                              -- the twelve most expensive names
--    trace.record(); job:step(); trace.export "step.json" -- open in chrome://tracing or Perfetto
--
-- Times are of this process and thread; `self_seconds` leaves out what other spans inside took, so those
-- of all names add up to the time that was traced.
local ffi = require "ffi"
local halo_ffi = require "halo.ffi"

local C, check = halo_ffi.C, halo_ffi.check

local M = {}

local ids = {}
local function id_of(name)
  local id = ids[name]
  if not id then
    id = C.halo_trace_id(name)
    ids[name] = id
  end
  return id
end

--- Open a span; give the token to `trace.finish`. For places where a function does not fit.
-- @treturn int token
function M.begin(name) return C.halo_trace_begin(id_of(name)) end
--- Close a span, and what was left open inside it.
function M.finish(token) C.halo_trace_end(token) end

local function finish_with(token, ok, ...)
  C.halo_trace_end(token)
  if not ok then error((...), 0) end
  return ...
end

--- Run a function inside a span and return what it returns; an error passes through.
-- @usage local loss = trace.span("validate", function() return job:loss_on(batch) end)
function M.span(name, f, ...) return finish_with(M.begin(name), pcall(f, ...)) end

--- Report work to the innermost open span.
-- @tparam number bytes moved @tparam number flops executed
function M.work(bytes, flops) C.halo_trace_work(bytes, flops) end

--- Count something that takes no time: one more call of `name`, and its work.
function M.count(name, bytes, flops) C.halo_trace_count(id_of(name), bytes or 0, flops or 0) end

--- All names that were used since the last reset, most expensive first.
-- @treturn {table,...} `name`, `calls`, `seconds`, `self_seconds`, `share` (of all self_seconds), `bytes`,
-- `flops`, `device_seconds`, `device_self_seconds` (0 unless `trace.device` is on)
function M.totals()
  local row, rows, sum = ffi.new "halo_trace_row[1]", {}, 0
  for id = 0, C.halo_trace_names() - 1 do
    check(C.halo_trace_read(row, id))
    local r = row[0]
    if r.calls > 0 then
      rows[#rows + 1] = { name = ffi.string(r.name), calls = tonumber(r.calls), seconds = r.seconds,
        self_seconds = r.self_seconds, bytes = r.bytes, flops = r.flops, device_seconds = r.device_seconds,
        device_self_seconds = r.device_self_seconds }
      sum = sum + r.self_seconds
    end
  end
  for _, r in ipairs(rows) do r.share = sum > 0 and r.self_seconds / sum or 0 end
  table.sort(rows, function(a, b)
    if a.self_seconds ~= b.self_seconds then return a.self_seconds > b.self_seconds end
    return a.name < b.name
  end)
  return rows
end

--- Totals of one name since the last reset, or nil.
function M.total(name)
  for _, r in ipairs(M.totals()) do
    if r.name == name then return r end
  end
end

--- The totals as text.
-- @tparam[opt=20] int n rows
function M.table(n)
  local lines = { ("%-36s %10s %10s %7s %10s %10s"):format("name", "calls", "seconds", "share", "GFLOP/s", "GB/s") }
  for i, r in ipairs(M.totals()) do
    if i > (n or 20) then break end
    local rate = r.self_seconds > 0 and 1e-9 / r.self_seconds or 0
    lines[#lines + 1] = ("%-36s %10d %10.4f %6.1f%% %10s %10s"):format(r.name, r.calls, r.self_seconds, 100 * r.share,
      r.flops > 0 and ("%.1f"):format(r.flops * rate) or "-", r.bytes > 0 and ("%.1f"):format(r.bytes * rate) or "-")
  end
  return table.concat(lines, "\n")
end

--- Time spans on a device's clock as well: `trace.device "cuda"`; `trace.device "cpu"` ends it. Work on a
-- device is queued, so the host's times of ops say little about it.
function M.device(name)
  check(C.halo_trace_device(require("halo.device").number(require("halo.device").require(name, 2))))
end

--- All totals to zero.
function M.reset() C.halo_trace_reset() end

local levels = { [0] = "off", "totals", "events" }
--- Switch counting on or off ("totals", "off"); returns the old setting. Off costs a branch per op.
function M.set(level)
  local number = level == "off" and C.HALO_TRACE_OFF or C.HALO_TRACE_TOTALS
  return levels[C.halo_trace_set_level(number)]
end

--- Keep every span from now on, until `export` or `stop`.
function M.record() check(C.halo_trace_record()) end
function M.stop() C.halo_trace_stop() end
--- Stop, and write the recorded window as Chrome trace JSON.
-- @tparam string path @tparam[opt=0] int rank becomes the process in the viewer
function M.export(path, rank) check(C.halo_trace_export(path, rank or 0)) end

--- Say where the run is; stored with every collective in the flight recorder.
function M.where(step, layer) C.halo_trace_where(step, layer or -1) end

--- The flight recorder's head.
-- @treturn int collectives begun @treturn int finished @treturn number seconds the last one has been waiting
function M.flight()
  local begun, done, waiting = ffi.new "int64_t[1]", ffi.new "int64_t[1]", ffi.new "double[1]"
  C.halo_trace_flight(begun, done, waiting)
  return tonumber(begun[0]), tonumber(done[0]), waiting[0]
end

--- Write the last 4096 collectives, one JSON object a line.
function M.flight_dump(path) check(C.halo_trace_flight_dump(path)) end

-- ---- signals ------------------------------------------------------------------------------------

--- Catch SIGUSR1, SIGTERM and SIGINT as requests (a second TERM or INT ends the process).
-- @tparam[opt] string crash_file where the flight recorder goes when the process crashes
function M.catch_signals(crash_file)
  C.halo_signals_restore()
  check(C.halo_signals_install(crash_file))
end

--- Handlers as they were before.
function M.release_signals() C.halo_signals_restore() end

--- What was asked for since the last `clear_signals`.
-- @treturn ?table `usr1`, `term`, `int` (true where asked); nil when nothing was
function M.signals()
  local mask = C.halo_signal_pending()
  if mask == 0 then return nil end
  return { usr1 = bit.band(mask, C.HALO_SIGNAL_USR1) ~= 0 or nil, term = bit.band(mask, C.HALO_SIGNAL_TERM) ~= 0 or nil,
    int = bit.band(mask, C.HALO_SIGNAL_INT) ~= 0 or nil }
end

function M.clear_signals() C.halo_signal_clear(-1) end

return M
