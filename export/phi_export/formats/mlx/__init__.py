"""MLX: a folder that mlx_lm opens, on Apple's GPUs or on any processor."""
