--- Charts as SVG text: heat maps and lines, nothing else.
--
-- Self-contained (no script, no font files, no style sheet), readable in any browser and in a diff.
-- Sizes are in pixels of the viewBox; text is the reader's sans-serif.
local M = {}

local FONT = 'font-family="system-ui,sans-serif"'

--- Text safe inside XML.
function M.escape(text)
  return (tostring(text):gsub("[&<>\"]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }))
end

--- The three-stop map of the needle heat maps people know (rose, amber, green).
M.needle_stops = { { 240, 73, 110 }, { 235, 184, 57 }, { 12, 215, 159 } }
--- White to blue, for shares of any kind.
M.blue_stops = { { 247, 251, 255 }, { 107, 174, 214 }, { 8, 48, 107 } }

--- Colour of a value in 0..1 on a list of stops, as red, green, blue in 0..255; values outside are clamped.
function M.color(value, stops)
  value = math.max(0, math.min(1, value))
  local at = value * (#stops - 1)
  local i = math.min(math.floor(at), #stops - 2)
  local t, a, b = at - i, stops[i + 1], stops[i + 2]
  local rgb = {}
  for c = 1, 3 do rgb[c] = math.floor(a[c] + (b[c] - a[c]) * t + 0.5) end
  return rgb
end

local function hex(rgb) return ("#%02x%02x%02x"):format(rgb[1], rgb[2], rgb[3]) end

-- Dark text on light cells, light text on dark ones (relative luminance, ITU-R BT.709 weights).
local function ink(rgb)
  return 0.2126 * rgb[1] + 0.7152 * rgb[2] + 0.0722 * rgb[3] > 130 and "#111" or "#fff"
end

local function text(x, y, s, o)
  o = o or {}
  return ('<text x="%g" y="%g" %s font-size="%g" fill="%s" text-anchor="%s"%s>%s</text>'):format(x, y, FONT,
    o.size or 12, o.fill or "#222", o.anchor or "middle", o.extra or "", M.escape(s))
end

local function document(width, height, body, title)
  return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">'
    .. '<title>%s</title><rect width="100%%" height="100%%" fill="#fff"/>%s</svg>\n')
    :format(width, height, width, height, M.escape(title or ""), table.concat(body, "\n"))
end

--- A heat map.
-- @tparam table o `title`, `x_label`, `y_label`, `columns` (labels), `rows` (labels, top first),
--   `values[row][column]` (0..1 or nil), `stops`, `format` (value -> text in the cell, "" for none),
--   `cell` ({ width, height }, default 64 x 34)
-- @treturn string an SVG document
function M.heatmap(o)
  local cw, ch = (o.cell or { 64, 34 })[1], (o.cell or { 64, 34 })[2]
  local longest = 0
  for _, label in ipairs(o.rows) do longest = math.max(longest, #tostring(label)) end
  local left, top = 34 + 7.5 * longest, 44
  local width, height = left + cw * #o.columns + 20, top + ch * #o.rows + 58
  width = math.max(width, left + 9 * #(o.title or "") + 8)
  local body = { text(left, 24, o.title or "", { size = 15, anchor = "start", extra = ' font-weight="600"' }) }
  for r, label in ipairs(o.rows) do
    body[#body + 1] = text(left - 8, top + ch * (r - 0.5) + 4, label, { anchor = "end" })
    for c = 1, #o.columns do
      local v = o.values[r] and o.values[r][c]
      local rgb = v and v == v and M.color(v, o.stops or M.needle_stops) or { 228, 228, 228 }
      body[#body + 1] = ('<rect x="%g" y="%g" width="%g" height="%g" fill="%s" stroke="#fff" stroke-width="1.5"/>')
        :format(left + cw * (c - 1), top + ch * (r - 1), cw, ch, hex(rgb))
      local shown = v and (o.format and o.format(v) or ("%.0f"):format(100 * v)) or ""
      if shown ~= "" then
        body[#body + 1] = text(left + cw * (c - 0.5), top + ch * (r - 0.5) + 4, shown, { fill = ink(rgb) })
      end
    end
  end
  local base = top + ch * #o.rows
  for c, label in ipairs(o.columns) do body[#body + 1] = text(left + cw * (c - 0.5), base + 18, label) end
  body[#body + 1] = text(left + cw * #o.columns / 2, base + 40, o.x_label or "", { fill = "#555" })
  body[#body + 1] = text(16, top + ch * #o.rows / 2, o.y_label or "", { fill = "#555",
    extra = (' transform="rotate(-90 16 %g)"'):format(top + ch * #o.rows / 2) })
  return document(math.ceil(width), math.ceil(height), body, o.title)
end

-- About five round steps between low and high (1, 2 or 5 times a power of ten).
local function ticks(low, high)
  local span = high - low
  if span <= 0 then return { low } end
  local power = 10 ^ math.floor(math.log(span / 4) / math.log(10))
  local step = power
  for _, m in ipairs { 2, 5, 10 } do
    if span / step > 6 then step = power * m end
  end
  local list, v = {}, math.ceil(low / step - 1e-9) * step
  while v <= high + step * 1e-9 do
    list[#list + 1] = math.abs(v) < step * 1e-9 and 0 or v
    v = v + step
  end
  return list
end

local function short(v)
  if math.abs(v) >= 1e6 then return ("%gM"):format(v / 1e6) end
  if math.abs(v) >= 1e4 then return ("%gK"):format(v / 1e3) end
  return ("%.4g"):format(v)
end

local palette = { "#1f6feb", "#d1495b", "#2e933c", "#8457c9", "#c77f0a", "#0e8a93" }

--- A line chart.
-- @tparam table o `title`, `x_label`, `y_label`, `series` (list of `{ name, points = {{x, y}, ...}, faint }`),
--   `log_x`, `log_y`, `marks` (list of `{ x, label }` drawn as vertical lines), `y_min`, `y_max`, `width`, `height`
-- @treturn string an SVG document
function M.lines(o)
  local width, height = o.width or 640, o.height or 300
  local has_legend = #o.series > 1
  local left, right, top, bottom = 62, 16, has_legend and 56 or 40, 46
  local function log_of(on) return on and function(v) return math.log(math.max(v, 1e-30)) / math.log(10) end
    or function(v) return v end end
  local fx, fy = log_of(o.log_x), log_of(o.log_y)
  local x0, x1, y0, y1 = math.huge, -math.huge, math.huge, -math.huge
  for _, s in ipairs(o.series) do
    for _, p in ipairs(s.points) do
      if p[1] == p[1] and p[2] == p[2] and math.abs(p[2]) < math.huge then
        x0, x1 = math.min(x0, fx(p[1])), math.max(x1, fx(p[1]))
        y0, y1 = math.min(y0, fy(p[2])), math.max(y1, fy(p[2]))
      end
    end
  end
  if x0 > x1 then x0, x1, y0, y1 = 0, 1, 0, 1 end
  if o.y_min then y0 = fy(o.y_min) end
  if o.y_max then y1 = fy(o.y_max) end
  if x1 == x0 then x1 = x0 + 1 end
  local pad = y1 > y0 and (y1 - y0) * 0.05 or 0.5
  if not o.y_min then y0 = y0 - pad end
  if not o.y_max then y1 = y1 + pad end
  local function px(v) return left + (fx(v) - x0) / (x1 - x0) * (width - left - right) end
  local function py(v) return height - bottom - (fy(v) - y0) / (y1 - y0) * (height - top - bottom) end
  local body = { text(left, 22, o.title or "", { size = 15, anchor = "start", extra = ' font-weight="600"' }) }
  local function grid(values, unlog, horizontal)
    for _, t in ipairs(values) do
      local v = unlog and 10 ^ t or t
      if horizontal then
        body[#body + 1] = ('<line x1="%g" x2="%g" y1="%g" y2="%g" stroke="#e5e5e5"/>'):format(left, width - right,
          py(v), py(v))
        body[#body + 1] = text(left - 6, py(v) + 4, short(v), { anchor = "end", size = 11, fill = "#555" })
      else
        body[#body + 1] = text(px(v), height - bottom + 16, short(v), { size = 11, fill = "#555" })
      end
    end
  end
  grid(ticks(y0, y1), o.log_y, true)
  grid(ticks(x0, x1), o.log_x, false)
  for _, m in ipairs(o.marks or {}) do
    body[#body + 1] = ('<line x1="%g" x2="%g" y1="%g" y2="%g" stroke="#999" stroke-dasharray="3 3"/>')
      :format(px(m[1]), px(m[1]), top, height - bottom)
    body[#body + 1] = text(px(m[1]) + 4, top + 10, m[2], { anchor = "start", size = 11, fill = "#777" })
  end
  local legend_x = left
  for i, s in ipairs(o.series) do
    local path, color = {}, palette[(i - 1) % #palette + 1]
    for _, p in ipairs(s.points) do
      if p[1] == p[1] and p[2] == p[2] and math.abs(p[2]) < math.huge then
        path[#path + 1] = ("%s%.1f %.1f"):format(#path == 0 and "M" or "L", px(p[1]), py(p[2]))
      end
    end
    body[#body + 1] = ('<path d="%s" fill="none" stroke="%s" stroke-width="%g" stroke-linejoin="round"%s/>')
      :format(table.concat(path, " "), color, s.faint and 1 or 2, s.faint and ' opacity="0.35"' or "")
    if s.name and has_legend then -- one row between title and plot
      body[#body + 1] = ('<rect x="%g" y="40" width="12" height="3" fill="%s"/>'):format(legend_x, color)
      body[#body + 1] = text(legend_x + 17, 45, s.name, { anchor = "start", size = 11 })
      legend_x = legend_x + 34 + 6.2 * #s.name
    end
  end
  body[#body + 1] = ('<rect x="%g" y="%g" width="%g" height="%g" fill="none" stroke="#bbb"/>')
    :format(left, top, width - left - right, height - top - bottom)
  body[#body + 1] = text((left + width - right) / 2, height - 10, o.x_label or "", { fill = "#555" })
  body[#body + 1] = text(14, (top + height - bottom) / 2, o.y_label or "", { fill = "#555",
    extra = (' transform="rotate(-90 14 %g)"'):format((top + height - bottom) / 2) })
  return document(width, height, body, o.title)
end

return M
