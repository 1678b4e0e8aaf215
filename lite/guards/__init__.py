"""What keeps ranks from hanging, drifting apart or going bad unnoticed; it trains nothing and saves nothing."""
