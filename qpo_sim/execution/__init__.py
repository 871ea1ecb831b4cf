"""What trading costs: from an order to what it earns after impact, fees and gas."""
