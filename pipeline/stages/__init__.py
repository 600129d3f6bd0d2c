"""Read first: tile, extract, train, score and draw as resumable stages, and the verbs over them."""
