--- Qwen3 (arXiv 2505.09388): no bias, RMSNorm on each query and key head, head size apart from width.
return {
  name = "qwen3",
  architecture = "Qwen3ForCausalLM",
  qkv_bias = false,
  qk_norm = true,
  defaults = { rope_theta = 1e6, eps = 1e-6, tie = true, head_dim = 128 },
}
