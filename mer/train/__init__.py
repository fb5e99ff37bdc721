"""Training of draft heads (mer.model.draft_head). Needs torch, the extra mer[train]."""
