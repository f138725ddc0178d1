-- People and cameras are texts as people write them: `0001`, `alice`, `entrance-2`. Images of nobody had negative numbers.

ALTER TABLE image
    ALTER pid TYPE text COLLATE "C" USING CASE WHEN pid >= 0 THEN pid::text END,
    ALTER camid TYPE text COLLATE "C" USING camid::text;
