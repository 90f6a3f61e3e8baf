"""Fine-tuning: the one loop, its objectives, data, optimisers and checkpoints."""
