--- Dense causal attention: every query sees every earlier key of its document.
return {
  name = "dense",
  path = "dense",
  doc = "Every query sees every earlier key of its document.",
  fields = {},
  example = "attention = dense { ring = gather { } }",
}
