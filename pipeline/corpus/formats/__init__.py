"""What a corpus is written in: records of Parquet, JSON lines, JSON files, data sets by name."""
