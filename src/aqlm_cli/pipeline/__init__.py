"""The order of the work: one file a stage in `stages/`, and stages never import each other."""
