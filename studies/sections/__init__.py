"""Report sections: `studies/sections/<study>.py` turns `<study>.csv` into numbers, verdicts and captions in words."""
