"""What `bench policy` is made of: its workloads and its verdicts."""
