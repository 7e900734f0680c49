"""From files to records: bytes, then lines or values, then the columns that hold what is sought."""
