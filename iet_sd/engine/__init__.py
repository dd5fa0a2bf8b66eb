"""The round engine: proxies trained on shards, averaged and redistributed at round boundaries."""
