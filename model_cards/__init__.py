"""Model cards: those of the shipped recipes, a folder each, and the card and upload of a model of one's own."""
