--- A progress bar where somebody watches, plain lines where nobody does.
--
--    local bar = progress.new { total = 200, label = "packing" }
--    for i = 1, 200 do ... bar:update(i, "12.3 MB/s") end
--    bar:done()
--
-- On a terminal one line is redrawn, at most ten times a second, with the time left from the mean step
-- time over the last 100 updates. In a file or a batch log a line is written every tenth of the way.
-- It writes to standard error: standard output is for results. Only rank 0 writes.
local launch = require "halo.launch"
local term = require "halo.term"

local M = {}
local Bar = {}
Bar.__index = Bar

local ffi = require "ffi"
if not pcall(ffi.typeof, "struct halo_timespec") then
  ffi.cdef [[
  struct halo_timespec { long sec; long nsec; };
  int clock_gettime(int clock, struct halo_timespec *out);
  ]]
end
local moment = ffi.new "struct halo_timespec"

--- Seconds on a clock that only goes forward.
function M.clock()
  ffi.C.clock_gettime(1, moment)
  return tonumber(moment.sec) + tonumber(moment.nsec) * 1e-9
end

--- @tparam table o `total`, `label` ("" by default), `enabled` (default: on rank 0)
function M.new(o)
  local now = M.clock()
  return setmetatable({
    total = o.total, label = o.label or "", is_tty = term.is_tty(2),
    enabled = o.enabled == nil and launch.is_first() or o.enabled or false,
    start = now, last_draw = -1, tenth = 0, recent = { { at = 0, time = now } },
  }, Bar)
end

-- Seconds per unit over the last 100 updates.
local function rate(self, i, now)
  local recent = self.recent
  recent[#recent + 1] = { at = i, time = now }
  if #recent > 100 then table.remove(recent, 1) end
  local first = recent[1]
  return i > first.at and (now - first.time) / (i - first.at) or 0
end

function Bar:draw(i, note, per_unit)
  local share = self.total > 0 and i / self.total or 1
  local text = ("%s %d/%d %3.0f%%"):format(self.label, i, self.total, share * 100)
  local tail = (note and note .. " " or "") .. "eta " .. term.duration(per_unit * (self.total - i))
  if not self.is_tty then
    io.stderr:write(text, "  ", tail, "\n")
    return
  end
  local room = math.min(40, term.width(2) - #text - term.length(tail) - 6)
  local bar = ""
  if room > 4 then
    local full = math.floor(share * room)
    bar = "[" .. ("="):rep(full) .. (full < room and ">" or "") .. (" "):rep(room - full - 1) .. "] "
  end
  io.stderr:write("\r\27[K", text, " ", bar, tail)
end

--- Tell how far we are.
function Bar:update(i, note)
  local now = M.clock()
  local per_unit = rate(self, i, now)
  if not self.enabled then return end
  if self.is_tty then
    if now - self.last_draw < 0.1 and i < self.total then return end
  else
    local tenth = math.floor(i / self.total * 10)
    if tenth == self.tenth then return end
    self.tenth = tenth
  end
  self.last_draw = now
  self:draw(i, note, per_unit)
end

--- Take the bar away, or leave a last line.
function Bar:done(note)
  if not self.enabled then return end
  if self.is_tty then io.stderr:write "\r\27[K" end
  if note then io.stderr:write(note, "\n") end
end

return M
