"""Which device holds which experts, what that costs each device, and the files that launch it: `mohge place`."""
