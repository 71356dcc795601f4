"""Mathematics on local shards: no ranks, no options, no state."""
