"""An index that is built: shard by shard, from what an encoder says, from an earlier index, or from ready vectors."""
