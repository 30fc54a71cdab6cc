"""Parts that methods share: statistics, rounding with error feedback, k-means, codebooks, the search for codes."""
