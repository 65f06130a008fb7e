"""The phases of training: pre-training, the update, batches drawn ahead, many seeds as one."""
