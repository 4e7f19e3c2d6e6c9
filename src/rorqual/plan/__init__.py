"""What a training run on many devices would take: time, memory, traffic, price."""
