"""More than one machine: experts that other machines hold in memory and compute. docs/cluster.md."""
