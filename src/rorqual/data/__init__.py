"""From text to token shards to batches; knows no model."""
