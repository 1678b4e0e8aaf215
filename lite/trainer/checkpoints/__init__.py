"""A Trainer's checkpoints: what they hold, which file a word stands for, those that Lightning wrote."""
