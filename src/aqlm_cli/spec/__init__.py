"""Settings, schemes, plan and cost estimates: pure arithmetic, never torch."""
