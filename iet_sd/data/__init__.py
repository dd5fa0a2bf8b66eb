"""From images and captions on disk or the Hub to batches: sources, transforms, shards, loading."""
