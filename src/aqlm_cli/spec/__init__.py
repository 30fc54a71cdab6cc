"""What is asked and what it costs: settings, schemes, plan and estimates. Pure arithmetic, never torch."""
