"""Fine-tuning: data, checkpoints, objectives and the one loop."""
