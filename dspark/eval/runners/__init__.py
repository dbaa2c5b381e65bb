"""What a benchmark runs: dspark's own engine, and the programs it is compared with."""
