"""From records to passages and questions: in which form they are published, and how long documents are cut."""
