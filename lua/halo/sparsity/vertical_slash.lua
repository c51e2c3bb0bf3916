--- Vertical-slash attention: the columns and diagonals that the last queries look at.
-- MInference (arXiv 2407.02490) for the pattern, MTraining (arXiv 2510.18830) for training with it.
return {
  name = "vertical_slash",
  doc = "The columns and diagonals that the last queries look at. MInference, MTraining (arXiv 2510.18830).",
  fields = function(kind, new)
    return {
      { "keep", kind.node "keep", default = new("mass", 0.9), shown_default = "default mass(0.9)",
        doc = "how much is kept" },
      { "estimate", kind.node "estimate", default = new("last_queries", 64),
        shown_default = "default last_queries(64)", doc = "where the choice comes from" },
      { "sink", kind.index, default = 30, doc = "first tokens of a document, always seen (MTraining's code)" },
      { "window", kind.index, default = 100, doc = "distances below this, always seen (MTraining's code)" },
    }
  end,
  build = function(o, words)
    local keep = words.keep
    return o.new_plan():select_vertical_slash {
      q = o.q, k = o.k, ring = o.ring, scale = o.scale, probe = words.estimate.count,
      verticals = keep.verticals, slashes = keep.slashes, mass = keep.type == "mass" and keep.share or 0,
    }:force { sink = words.sink, window = words.window }:finish()
  end,
  example = "attention = sparse.vertical_slash { keep = mass(0.90), dense = { layers = { 1, 2 } } }",
}
