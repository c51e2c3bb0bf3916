-- Qwen2.5-3B from 32K to 512K tokens on one GPU of 141 GB (H200): continued pre-training with AdamW, fp32
-- masters and moments included.
--
--   model     a Hugging Face folder, models/Qwen2.5-3B (config.json, safetensors, tokenizer)
--   data      books, one document per file, and generated needle documents among them
--   lengths   32K dense as the model knows it -> 128K and 512K with YaRN
--   sparsity  dense below 128K; vertical-slash from there on, at most 2048 columns and 4096 diagonals a head
--   memory    at 128K 76 GiB (forecast); at 512K block inputs wait in host memory: 72 GiB of it, pinned
--   source    lengths and rate follow MTraining (arXiv 2510.18830, 5.1); steps are ours, a start
--
-- halo check recipes/qwen2.5-3b.lua                        stages, memory, flops; needs no GPU
-- halo run recipes/qwen2.5-3b.lua stages=1 steps=20        a trial at 32K
-- halo run recipes/qwen2.5-3b.lua model.from=DIR data=DIR  another folder, another text
return recipe "qwen2.5-3b" {
  device = "cuda", -- bf16 follows from it
  model = model.hf "models/Qwen2.5-3B" { recompute = "block" },

  attention = sparse.vertical_slash {
    keep = mass(0.95, { verticals = 2048, slashes = 4096 }), sink = 64, window = 1*K,
    dense = { below = 128*K },
    ring = flat { layout = "contiguous", block = 128 },
  },

  data = mix {
    sources = {
      books = text "data/books",
      hidden = needles { digits = 7, questions = { 1, 8 }, text_weight = 1, answer_weight = 20 },
    },
    weights = { books = 9, hidden = 1 },
  },

  optim = adamw { lr = warmup(1e-5, { steps = 20 }):cosine { to = 1e-6 }, betas = { 0.9, 0.95 }, decay = 0.1,
    clip = 1.0 },

  stages = {
    stage { name = "32K", context = 32*K, batch = 16, accumulate = 16, steps = 60 },
    stage { name = "128K", context = 128*K, batch = 4, accumulate = 4, steps = 100, rope = yarn { to = 128*K } },
    stage { name = "512K", context = 512*K, batch = 1, steps = 200, rope = yarn { to = 512*K }, offload = true },
  },

  every = { [20] = measure.sparsity { layers = { 1, 12, 24, 36 } }, [50] = save { keep = 2 } },
  finally = {
    eval.niah { lengths = { 32*K, 128*K, 512*K }, depths = 5, samples = 1 },
    eval.ppl { lengths = { 32*K, 128*K }, last = 4*K, documents = 4 },
    measure.sparsity { compare = { "dense" } },
    save {},
  },
  guard = { loss_spike { z = 6, act = "skip" } },
}
