"""The networks that the benchmarks run on: classes and tables, a file a suite (`CASES`) or a kind of network."""
