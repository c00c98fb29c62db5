"""The kinds of files that rows and contrast sets are read from, by suffix; imports nothing, for help texts."""

ROW_KINDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # suffixes of files whose rows are objects
CONTRAST_KINDS = f".json, {', '.join(ROW_KINDS[:-1])} or {ROW_KINDS[-1]}"  # what a contrast set may be read from
