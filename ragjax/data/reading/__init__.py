"""From a source to records: its files, their bytes, and what stands in them as JSON, tables or Arrow."""
