--- A window of near keys and the first keys of the document (attention sinks, arXiv 2309.17453).
return {
  name = "window",
  path = "window",
  doc = "Near keys and the first keys of the document. Sinks: arXiv 2309.17453.",
  fields = function(kind)
    return {
      { "window", kind.tokens, required = true, doc = "keys this near are seen, tokens; rounded up to blocks" },
      { "sink", kind.index, default = 4, doc = "first tokens of a document, seen by all (the paper's 4)" },
    }
  end,
  is_static = true,
  build = function(o, words)
    return o.new_plan():force { sink = words.sink, window = words.window }:finish()
  end,
  example = "attention = window { window = 1024, sink = 4 }",
}
