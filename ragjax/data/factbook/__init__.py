"""The CIA World Factbook as passages and questions."""
