--- Dense causal attention: every query sees every earlier key of its document.
return {
  name = "dense",
  path = "dense",
  doc = "Every query sees every earlier key of its document.",
  fields = {},
  is_static = true,
  build = function(o) return o.new_plan():add_all():finish() end,
  example = "attention = dense { ring = gather { } }",
}
