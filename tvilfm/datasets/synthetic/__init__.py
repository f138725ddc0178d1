"""The synthetic tri-modal benchmark: rendered pedestrians, honest enough to learn from and to fail on.

Every person is a combination of attributes. Some survive in infrared (sex, hair style, garments, pattern, bag, hat):
together they are the person's *archetype*, and only 24 archetypes exist, so about every fifth stranger looks the same
to an infrared camera. The rest is colour, which only visible cameras and visible captions know. Infrared retrieval is
therefore ambiguous by construction and text can resolve it; a method that ignores the text stays near the archetypes'
ceiling.

The surprising choice is the infrared reflectance: a garment's brightness in infrared is a mixture of its visible
luminance and a random constant of its material, fixed for the person. Infrared images of one person so agree with
each other (infrared-to-infrared retrieval works) while their brightness tells little about colour.

Captions are written from what the *rendered image* shows, with the faults of real captioners: an attribute left out,
a wrong one, other words for the same thing, filler words. The files on disk have the exact layout of SYSU-MM01, RegDB,
LLCM or one's own folder, including the published caption files, so the reader of the real dataset reads them.
"""
